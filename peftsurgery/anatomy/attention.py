"""Attention cores: what is attended, and which projections feed it.

A core is a scaled_dot_product_attention call, or a softmax between two products of values:

    o = matmul(softmax(mask(scale(matmul(q, k.T)))), v)

An exponential that is divided by its sum is a softmax; a sigmoid may be in its place. Whatever the
model does between the products (a bias of positions, a cap on the scores, a gate for each head,
probabilities filled with zeros or made to sum to one again) is its own.
The second product may be written the other way round, ``matmul(v.T, softmax(...).T)``; then v and o
are ``turned``, as keys are that are held transposed.
Bindings of an attention site: ``q`` (..., heads, tokens, head_dim), ``k`` and ``v`` (before heads
shared by several queries are repeated), ``x`` that the queries are projected from, if it is one
value, ``mask`` if there is one (what says which keys are seen, without the model's biases where
they can be told apart), ``o`` what the core returns, and ``q_operand``, ``k_operand``,
``v_operand`` exactly as the core reads them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from torch import fx

from peftsurgery.anatomy.flow import LIGHT, Flow, forward
from peftsurgery.anatomy.ops import Trait, has, meaning
from peftsurgery.anatomy.site import Site
from peftsurgery.anatomy.values import (
    backward,
    fixed,
    is_swap,
    is_tensor,
    operands,
    parameter_of,
    shape,
    sizes,
    strip,
    width,
)
from peftsurgery.capture.schemas import arguments, op
from peftsurgery.reach import reach

TOUCHES = Trait.LAYOUT | Trait.DROPOUT | Trait.FILL | Trait.SCALING
"""What may be done to probabilities before they meet values."""


@dataclass(frozen=True, eq=False)
class Core:
    """An attention core: its operands as it reads them, and what it returns."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    o: fx.Node
    mask: fx.Node | None
    turned: frozenset[str]  # of k, v and o, those that are (..., head_dim, tokens)
    fused: fx.Node | None  # the SDPA call
    scores: fx.Node | None = None  # the product of q and k
    softmax: fx.Node | None = None
    is_causal: bool = False
    weights: fx.Node | None = None  # what the values are multiplied with
    parts: Parts | None = None  # if its scores or its values are in parts

    def operands(self, part: str) -> tuple[fx.Node, ...]:
        """All that is attended by, attended to or summed: what q, k or v is, in all parts."""
        first: fx.Node = getattr(self, part)
        return (first, *(() if self.parts is None else getattr(self.parts, part)))

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """What it returns, in all parts."""
        return (self.o, *(() if self.parts is None else self.parts.o))

    @property
    def shared(self) -> tuple[fx.Node, fx.Node]:
        """Keys and values before they are repeated for the heads that share them.

        As the core reads them, if they are repetitions of one tensor or only one is repeated.
        """
        if self.keeps_repeats:
            return self.k, self.v
        return before_repeat(self.k), before_repeat(self.v)

    @property
    def keeps_repeats(self) -> bool:
        """Whether keys and values have repeats that their sources cannot stand for."""
        k, v = before_repeat(self.k), before_repeat(self.v)
        return k is v or (k is self.k) != (v is self.v)


def find_cores(flow: Flow) -> tuple[list[Core], list[fx.Node]]:
    """The attention cores of a program, in its order; and what they return that cannot be read.

    A core is read if its queries, keys and values are three batches of vectors, of a fixed size and
    number of heads, each a value of its own: a rule that changes one would change another with it.
    Of one in parts, which is among both, the projections are known, and no more.
    """
    read: list[Core] = []
    unread: list[fx.Node] = []
    for core in {core.o: core for node in flow.nodes for core in _core(flow, node)}.values():
        parts = (core.q, *core.shared)
        is_known = width(core.q) is not None and all(map(_has_fixed_heads, parts))
        is_whole = len(set(parts)) == 3 and is_known and core.parts is None
        if is_whole or core.parts is not None:
            read.append(core)
        if not is_whole:
            unread.append(core.o)
    return read, unread


def _has_fixed_heads(node: fx.Node) -> bool:
    return len(shape(node)) >= 3 and (len(shape(node)) != 4 or fixed(shape(node)[1]) is not None)


def _core(flow: Flow, node: fx.Node) -> Iterator[Core]:
    if has(node, Trait.ATTENTION):
        given = arguments(node)
        mask = given["attn_mask"] if isinstance(given["attn_mask"], fx.Node) else None
        q, o = unpacked_queries(given["query"], node)
        causal = given["is_causal"] is True
        yield Core(q, given["key"], given["value"], o, mask, frozenset(), node, is_causal=causal)
    elif has(node, Trait.SOFTMAX) or op(node) in ("exp", "sigmoid"):
        product = weighted_sum(flow, node)
        if product is not None:
            yield from _by_hand(flow, node, *product)


def unpacked_queries(q: fx.Node, core: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Queries, and what the core returns, of one token by heads: (batch, heads, 1, head_dim).

    When there is one token, the queries that share keys are packed: they take the tokens' place,
    (batch, kv_heads, queries, head_dim), and are put back afterwards.
    """
    result = next(iter(core.users), core)
    if not (has(q, Trait.RESHAPE) and has(result, Trait.RESHAPE)):
        return q, core
    source = q.all_input_nodes[0]
    if len(shape(source)) != 4 or len(shape(q)) != 4:
        return q, core
    batch, heads, tokens, _ = sizes(source)
    packed = sizes(q)
    is_packed = tokens == 1 and packed[0] == batch and packed[1] * packed[2] == heads != packed[1]
    back = is_packed and sizes(result) == sizes(source) and len(core.users) == 1
    return (source, result) if back else (q, core)


def weighted_sum(
    flow: Flow, softmax: fx.Node, through: Trait = TOUCHES
) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The probabilities as they meet v, their product with it, and v.

    They come first, or last with queries and keys exchanged. ``through`` is what may be done to
    them on their way.
    """
    for probabilities in forward([softmax], through):
        for user in probabilities.users:
            pair = factors(flow, user)
            if pair is not None and pair[0] is probabilities:
                return probabilities, user, pair[1]
            if pair is not None and _is_turned(probabilities, softmax):
                return probabilities, user, pair[0]
    return None


def _is_turned(probabilities: fx.Node, softmax: fx.Node) -> bool:
    """Whether the last two axes of probabilities are exchanged, an odd number of times."""
    times = 0
    while probabilities is not softmax and has(probabilities, TOUCHES):
        times += is_swap(probabilities)
        probabilities = probabilities.all_input_nodes[0]
    return times % 2 == 1


def factors(flow: Flow, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two factors of a product of values, or None for another node."""
    if node in flow.products:
        return None
    if op(node) == "einsum":
        pair = arguments(node)["tensors"]
    else:
        pair = [node.args[i] for i in meaning(node).operands[:2] if meaning(node).turned]
    if len(pair) != 2 or not all(map(is_tensor, pair)):
        return None
    if any(parameter_of(factor)[0] is not None for factor in pair):
        return None
    return cast("tuple[fx.Node, fx.Node]", tuple(pair))


def _by_hand(
    flow: Flow, softmax: fx.Node, weights: fx.Node, o: fx.Node, v: fx.Node
) -> Iterator[Core]:
    """The core of a softmax, if one product of its scores is that of queries and keys."""
    inside = flow.made_of(softmax, lambda n: n in flow.products or factors(flow, n) is not None)
    pairs = {n: pair for n in inside if flow.is_signal(n) and (pair := factors(flow, n))}
    products = sorted(pairs, key=flow.order.__getitem__)
    if len(products) > 1:  # position terms are products too: keys come from where values come from
        inputs = _inputs(flow, v)
        products = [n for n in products if inputs & _inputs(flow, pairs[n][1])]
    for scores in products[:1]:
        pair = pairs[scores]
        swapped = strip(pair[1], Trait.SCALING | Trait.CAST)
        plain = is_swap(swapped)
        k = swapped.all_input_nodes[0] if plain else pair[1]
        if plain and k in (pair[0], v):  # one tensor read in two layouts: cut where they part
            k, plain = pair[1], False
        mask = _mask(softmax, scores)
        turned = frozenset("" if plain else "k") | frozenset("vo" if o.args[0] is v else "")
        parts = parts_of(flow, softmax, scores, o)
        yield Core(pair[0], k, v, o, mask, turned, None, scores, softmax, False, weights, parts)


@dataclass(frozen=True, eq=False)
class Parts:
    """Further queries, keys, values and results of a core whose softmax has several products.

    p = softmax(cat([q @ g.T, q @ k.T])), o = p[:n] @ u + p[n:] @ v: blocks of tokens that attend to
    themselves and to some tokens of all blocks (Phang et al., 2022, arXiv:2208.04347). There may be
    no further ones: a band of scores is put together by its diagonals, written in place (Beltagy et
    al., 2020, arXiv:2004.05150). No rule can call such a core: no product of it has all scores.
    """

    q: tuple[fx.Node, ...]
    k: tuple[fx.Node, ...]
    v: tuple[fx.Node, ...]
    o: tuple[fx.Node, ...]


def parts_of(flow: Flow, softmax: fx.Node, scores: fx.Node, o: fx.Node) -> Parts | None:
    """The parts of a core beside one product of its scores and one result; None if it is whole."""

    def is_product(node: fx.Node) -> bool:
        return node in flow.products or factors(flow, node) is not None

    def made(node: fx.Node) -> list[fx.Node]:
        return [n for n in backward([node], is_product) if factors(flow, n) and flow.is_signal(n)]

    way = list(backward([softmax], is_product))
    joined = [[made(piece) for piece in operands(n)] for n in way if op(n) in ("cat", "concat")]
    others = [
        product
        for pieces in joined
        if any(scores in piece for piece in pieces)
        for piece in pieces
        if scores not in piece
        for product in piece
    ]
    if scores in way and not others:
        return None
    pairs = [pair for n in others if (pair := factors(flow, n)) is not None]
    sums = [
        (user, pair[1])
        for node in forward([softmax], TOUCHES)
        for user in node.users
        if user is not o and (pair := factors(flow, user)) is not None and pair[0] is node
    ]
    queries, keys = (tuple(pair[i] for pair in pairs) for i in (0, 1))
    return Parts(queries, keys, tuple(v for _, v in sums), tuple(user for user, _ in sums))


def visibility(mask: fx.Node) -> fx.Node:
    """Boolean mask behind a mask that selects biases for visible keys, and a number elsewhere.

    Other masks are what they are: added, or true for keys that are seen.
    """
    inner = strip(mask, Trait.CAST)
    if op(inner) != "where":
        return mask
    shown, *others = operands(inner)
    return shown if any(len(shape(other)) > 2 for other in others) else mask


def _inputs(flow: Flow, node: fx.Node) -> set[fx.Node]:
    return {site.nodes["x"] for site in flow.origin(node)}


def _mask(softmax: fx.Node, scores: fx.Node) -> fx.Node | None:
    """The mask that is last added to, or fills, the scores before the softmax."""
    node = softmax.all_input_nodes[0]
    while node is not scores:
        inputs = operands(node)
        if not inputs:
            return None
        on_way = [n for n in inputs if n is scores or scores in backward([n])]
        others = [n for n in inputs if n not in on_way]
        if others and has(node, Trait.ADDITION | Trait.FILL):
            return others[-1]
        if not on_way:
            return None
        node = on_way[0]
    return cast("fx.Node", scores.args[0]) if len(meaning(scores).operands) > 2 else None


def before_repeat(node: fx.Node) -> fx.Node:
    """Keys or values before each head is repeated for the queries that share it."""
    if op(node) == "repeat_interleave":
        return node.all_input_nodes[0]
    inner = strip(node, Trait.RESHAPE | Trait.CAST)
    if not has(inner, Trait.EXPANSION):
        return node
    source = inner
    while has(source, Trait.EXPANSION) or op(source) == "unsqueeze":
        source = source.all_input_nodes[0]
    return source if len(shape(source)) == len(shape(node)) else node


def projections_out(flow: Flow, core: Core, returned: Collection[fx.Node]) -> tuple[Site, ...]:
    """The linear that projects what the core returns; several if each projects a part of it.

    ``returned`` is what all cores of the program return: their sums and differences are projected
    for each of them. Parts are tokens: those of an image and those of a text, attended to at once,
    or those that go to each of several experts.
    """

    def goes_on(node: fx.Node) -> bool:
        if has(node, LIGHT | Trait.PICK):
            return True
        both = operands(node)
        return has(node, Trait.ADDITION) and all(_is_made_of(n, returned) for n in both)

    values = list(reach([core.o], lambda node: (n for n in node.users if goes_on(n))))
    readers = {s: v for v in values for s in flow.by_input.get(v, ()) if s.nodes["x"] in values}
    if len(readers) == 1 or (readers and _are_parts(list(readers.values()), core.o)):
        return tuple(readers)
    return ()


def _are_parts(read: Sequence[fx.Node], whole: fx.Node) -> bool:
    """Whether values are each another part of one, of which none is a part of another."""
    cuts = [
        {n for n in backward([part], lambda n: n is whole) if op(n) in ("slice", "getitem")}
        for part in read
    ]
    return all(one - other for one in cuts for other in cuts if one is not other)


def _is_made_of(node: fx.Node, returned: Collection[fx.Node]) -> bool:
    """Whether a value is what a core returns, but for layout, scale and norms."""
    found = backward([node], lambda n: n in returned or not has(n, LIGHT))
    return any(n in returned for n in found)


def reads_cache(flow: Flow, core: Core) -> bool:
    """Whether keys come from a cache: tokens see earlier ones, whatever the mask is."""
    keys = backward([core.k], lambda node: node in flow.products)
    return any(op(node) == "with_past" for node in keys)


def depends_on_order(nodes: Iterable[fx.Node]) -> bool:
    """Whether a comparison of two positions, or a triangle, is among what a mask is made of."""
    return any(compares_order(node) for node in nodes)


def compares_order(node: fx.Node) -> bool:
    """Whether a node tells earlier from later positions."""
    if has(node, Trait.TRIANGLE):
        return True
    both = operands(node)
    return has(node, Trait.COMPARISON) and len(both) == 2 and all(map(is_position, both))


def is_position(node: fx.Node) -> bool:
    """Whether a value is a position: it is computed from an arange."""
    return any(has(found, Trait.COUNT) for found in backward([node]))
