"""The running form of a rewritten program: what a rule inserted, computed with less work.

    y + s * linear(h, B) + ...    ->    one sum, made in place of y = linear(x, W)
    linear(x, A)                  ->    a part of it; all sums of one x are one operation
    y + s * anything else         ->    one operation (:mod:`.scaled_sums`)

Only what surgery inserted is taken, and a linear of the model whose result nothing reads but such a
sum. It is algebra on the graph: sums are flattened, the numbers before their summands multiplied,
the dtype that they are made in remembered; :mod:`.joined_linears` computes the rest. A value that
anything else reads is left where it is. A program's own graph stays what the rule's text says; this
one is run in its place.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from peftsurgery.anatomy.values import sizes
from peftsurgery.capture.schemas import op
from peftsurgery.surgery.rewrite.dtypes import dtype_of
from peftsurgery.surgery.rewrite.inserted_sums import (
    Summand,
    cast_to,
    is_inserted,
    is_linear,
    is_part,
    is_sum,
    is_written_between,
    leaves_of_sum,
    source_of,
    writes,
)
from peftsurgery.surgery.rewrite.joined_call import JoinedCall
from peftsurgery.surgery.rewrite.joined_linears import JoinedInputs, Term
from peftsurgery.surgery.rewrite.scaled_sums import drop_round_trips, join_scaled_sums

ATEN = torch.ops.aten


@dataclass(frozen=True)
class BaseLinear:
    """A linear of the model: input, weight ((in, out) if it is turned), bias; its own nodes."""

    x: fx.Node
    weight: fx.Node
    turned: bool
    bias: fx.Node | None
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class InsertedSum:
    """A value ``start`` and what is added to it, in the dtype ``compute`` if that is another.

    ``root`` is the sum's node; ``base`` the linear that makes the start for this sum alone, if one
    does.
    """

    root: fx.Node
    start: fx.Node
    base: BaseLinear | None
    summands: tuple[Summand, ...]
    compute: torch.dtype | None

    @property
    def x(self) -> fx.Node:
        """The base's input; without one, what a hidden value is made of, or such a value."""
        if self.base is not None:
            return self.base.x
        made_of = (_input(each.hidden, self.compute) for each in self.summands)
        return next(filter(None, made_of), self.summands[0].hidden)

    @property
    def hidden(self) -> list[fx.Node]:
        """The hidden values, each once."""
        return list(dict.fromkeys(each.hidden for each in self.summands))

    @property
    def is_of_one_input(self) -> bool:
        """Whether x, parameters and nothing else make this sum."""
        return self.base is not None and all(map(self.is_down, self.hidden))

    def is_down(self, hidden: fx.Node) -> bool:
        """Whether a hidden value is a product of x that nothing but this sum reads."""
        own = sum(each.hidden is hidden for each in self.summands)
        return len(hidden.users) == own and _input(hidden, self.compute) is self.x


def optimised(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph that computes the same, what surgery inserted in its running form."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    found = [each for each in _sums(copied) if not is_written_between(each.start, each.root)]
    for group in _groups(copied, found):
        _join(copied, group)
    join_scaled_sums(copied)
    drop_round_trips(copied)
    made = {node for each in found if each.base is not None for node in each.base.nodes}
    for node in reversed(copied.nodes):
        if not node.users and (node in made or is_inserted(node)):
            copied.erase_node(node)
    return copied


def _sums(graph: fx.Graph) -> Iterator[InsertedSum]:
    """The largest sums that surgery inserted, in order."""
    inner: set[fx.Node] = set()
    found = []
    for node in reversed(graph.nodes):
        if node not in inner and is_inserted(node):
            made = _sum(node, inner)
            found += [] if made is None else [made]
    return reversed(found)


def _sum(root: fx.Node, inner: set[fx.Node]) -> InsertedSum | None:
    """The sum that a node is, if there is one start in it; its nodes are added to ``inner``."""
    outer = cast_to(root)
    top = root if outer is None else source_of(root)
    if not is_sum(top) or (top is not root and not is_part(top)):
        return None
    seen, casts = {top}, set[torch.dtype | None]()
    leaves = list(leaves_of_sum(top, 1, seen, casts))
    summands = tuple(each for each in leaves if isinstance(each, Summand))
    rest = [each for each in leaves if not isinstance(each, Summand)]
    if not summands or len(rest) != 1 or rest[0][0] != 1:
        return None
    if len({each.scale > 0 for each in summands}) > 1:
        return None  # a difference of equal products is nothing, as long as each is rounded alike
    start = rest[0][1]
    compute = None if outer is None else cast_to(start)
    if outer is not None:
        start = source_of(start)
        if compute is None or dtype_of(start) != outer:
            return None
    if casts - {compute}:
        return None
    inner |= seen
    return InsertedSum(root, start, _base(start), summands, compute)


def _input(hidden: fx.Node, compute: torch.dtype | None) -> fx.Node | None:
    """The x of an inserted linear(x, A) that is computed in ``compute``; None for anything else."""
    if not (is_inserted(hidden) and is_linear(hidden, hidden.args[2:])):
        return None
    x: Any = hidden.args[0]
    if compute is None:
        return x
    return source_of(x) if cast_to(x) == compute else None


def _down(hidden: fx.Node) -> fx.Node:
    """The weight of a linear."""
    _, weight = hidden.all_input_nodes
    return weight


def _base(start: fx.Node) -> BaseLinear | None:
    """The linear of the model that makes a value for one reader."""
    if is_inserted(start) or len(start.users) != 1 or start.kwargs:
        return None
    if op(start) == "linear":
        given: Any = (*start.args, None)
        x, weight, bias = given[:3]
        return BaseLinear(x, weight, False, bias, (start,))
    if op(start) not in ("view", "reshape") or op(source_of(start)) != "addmm":
        return None
    product = source_of(start)
    operands: Any = product.args
    bias, flat, weight = operands
    if product.kwargs or len(product.users) != 1 or op(flat) not in ("view", "reshape"):
        return None
    x = source_of(flat)
    last = sizes(x)[-1]
    if flat.args[1] != [-1, last] or sizes(start)[:-1] != sizes(x)[:-1] or bias.op != "get_attr":
        return None
    return BaseLinear(x, weight, True, bias, (start, product, flat))


def _groups(graph: fx.Graph, sums: Sequence[InsertedSum]) -> Iterator[list[InsertedSum]]:
    """Sums that can be made at once, where the first of them is."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    written = [order[node] for node in graph.nodes if writes(node)]
    groups: dict[Any, list[InsertedSum]] = {}
    for each in sums:
        key = (each.x, each.compute) if each.is_of_one_input else each.root
        first = groups.setdefault(key, [each])[0]
        if first is each:
            continue
        begin, end = order[first.start], order[each.root]
        is_ready = all(_is_ready(node, first.root, order) for node in _tensors(each))
        if is_ready and not any(begin < write < end for write in written):
            groups[key].append(each)
        else:
            groups[each.root] = [each]
    return iter(groups.values())


def _tensors(each: InsertedSum) -> Iterator[fx.Node]:
    """What a sum reads beside x."""
    if each.base is not None:
        yield from filter(None, (each.base.weight, each.base.bias))
    else:
        yield each.start
    for hidden in each.hidden:
        yield _down(hidden) if each.is_down(hidden) else hidden
    yield from (summand.up for summand in each.summands)


def _is_ready(node: fx.Node, place: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    """Whether a value is there before a node, or can be: a tensor of the model, or one cast."""
    if order[node] < order[place] or node.op == "get_attr":
        return True
    return cast_to(node) is not None and _is_ready(source_of(node), place, order)


def _join(graph: fx.Graph, group: Sequence[InsertedSum]) -> None:
    """Put one operation in the place of a group's sums."""
    place, place_of = group[0].root, {n: i for i, n in enumerate(graph.nodes)}
    for node in (node for each in group for node in _tensors(each)):
        _bring(node, place, place_of)
    with graph.inserting_before(place):
        inputs, terms = _joined(graph, group)
        tensors = dict.fromkeys(node for node in inputs.row if node is not None)
        number = {node: index for index, node in enumerate(tensors)}
        places = inputs.filled([n if n is None else number[n] for n in inputs.row])
        call = JoinedCall(places, terms, group[0].compute)
        joined = graph.call_function(call, tuple(tensors))
        joined.meta = {**place.meta}
        for index, each in enumerate(group):
            result = graph.call_function(operator.getitem, (joined, index))
            result.meta = dict(each.root.meta)
            each.root.replace_all_uses_with(result)


def _joined(graph: fx.Graph, group: Sequence[InsertedSum]) -> tuple[JoinedInputs, list[Term]]:
    """What a group's sums read, and their terms."""
    downs: dict[fx.Node, fx.Node] = {}
    given: list[fx.Node] = []
    for each in group:
        for hidden in each.hidden:
            if each.is_down(hidden):
                downs[hidden] = _down(hidden)
            else:
                given.append(hidden)
    number = {node: index for index, node in enumerate([*downs, *given])}
    terms, ups = list[Term](), list[fx.Node]()
    for index, each in enumerate(group):
        for summand in each.summands:
            terms.append(Term(index, number[summand.hidden], summand.scale))
            ups.append(summand.up)
    weights = [_weight(graph, each.base) for each in group]
    biases = [None if each.base is None else each.base.bias for each in group]
    starts = [each.start if each.base is None else None for each in group]
    inputs = JoinedInputs(group[0].x, weights, biases, starts, [*downs.values()], given, ups)
    return inputs, terms


def _weight(graph: fx.Graph, base: BaseLinear | None) -> fx.Node | None:
    """The weight of a linear as (out, in)."""
    if base is None:
        return None
    return graph.call_function(ATEN.t.default, (base.weight,)) if base.turned else base.weight


def _bring(node: fx.Node, place: fx.Node, order: Mapping[fx.Node, int]) -> None:
    """Move a value before a node, if it comes later."""
    if order[node] > order[place]:
        for source in node.all_input_nodes:
            _bring(source, place, order)
        place.prepend(node)
