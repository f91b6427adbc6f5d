"""Residual sites: where a sublayer's output joins the stream it was computed from.

    y = x + h       x the stream, h computed from x through at least one weight or core

Bindings: ``h``, ``x``, ``y``, and ``normed`` where the sum is normalised. Where two sublayers run
side by side, y = x + (h1 + h2) or y = (x + h1) + h2, each has its own site with the same x; in the
first the same y, too. Facts: ``after``
(attention, ffn or other), ``kind`` after attention (self or cross), ``norm`` (pre: the sublayer
normalises its input; post: the sum is normalised), ``parallel``, ``features`` (the axis of the
stream that has them: -1, or 1 where it is an image) and ``width`` where it is fixed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from peftsurgery.anatomy.flow import Flow
from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.site import Site
from peftsurgery.anatomy.values import (
    backward,
    fixed,
    is_tensor,
    operands,
    parameter_of,
    shape,
    sizes,
    strip,
)
from peftsurgery.capture.names import common
from peftsurgery.capture.schemas import op

BETWEEN = Trait.LAYOUT | Trait.DROPOUT | Trait.SCALING  # a sublayer and its sum


@dataclass(frozen=True, eq=False)
class Join:
    """A residual addition: the stream, what is added to it, the sum, and what lies between.

    ``leaves`` are the values that run side by side and are summed into h, or h alone.
    """

    x: fx.Node
    h: fx.Node
    y: fx.Node
    leaves: tuple[fx.Node, ...]
    region: frozenset[fx.Node]

    @property
    def outputs(self) -> Mapping[fx.Node, Sequence[fx.Node]]:
        """The sublayers' outputs, with the leaves that each is the sum of.

        Leaves in another shape than the stream's (all tokens in a row, for experts) are parts of
        one sublayer.
        """
        if any(sizes(leaf) != sizes(self.x) for leaf in self.leaves):
            return {self.h: self.leaves}
        return {leaf: (leaf,) for leaf in self.leaves}


def find_joins(flow: Flow) -> list[Join]:
    """The residual additions of a program, in its order."""
    return [join for node in flow.nodes if (join := _join_at(flow, node)) is not None]


def _join_at(flow: Flow, node: fx.Node) -> Join | None:
    if op(node) != "add":
        return None
    pair = [n for n in node.args[:2] if is_tensor(n) and isinstance(n, fx.Node)]
    if len(pair) != 2 or not flow.is_signal(node) or len(shape(node)) < 2:
        return None
    if any(sizes(n) != sizes(node) for n in pair):
        return None
    for h, given in (pair, pair[::-1]):
        for x in (given, *_beside(flow, given)):
            region = between(flow, _as_read(x), h)
            if region is not None:
                return Join(x, h, node, tuple(_leaves(flow, x, h)), region)
    return None


def _beside(flow: Flow, total: fx.Node) -> Iterable[fx.Node]:
    """The stream x if a value is x + h1, and is read for one more sum alone: (x + h1) + h2."""
    if op(total) == "add" and len(total.users) == 1:
        join = _join_at(flow, total)
        if join is not None:
            yield join.x


def _as_read(x: fx.Node) -> fx.Node:
    """A stream before it is scaled and shifted by numbers that the model has learnt, for its sum.

    The sublayer reads it as it is (ZAYA, Anthony et al., 2025, arXiv:2511.17127).
    """
    while has(x, Trait.SCALING | Trait.ADDITION):
        pair = [n for n in x.args[:2] if isinstance(n, fx.Node)]
        signals = [n for n in pair if parameter_of(n)[0] is None]
        if len(pair) != 2 or len(signals) != 1 or sizes(signals[0]) != sizes(x):
            break
        x = signals[0]
    return x


def between(flow: Flow, x: fx.Node, h: fx.Node) -> frozenset[fx.Node] | None:
    """What is computed from x on the way to h, if a weight, a core or a block is on it."""
    first = flow.order[x]
    if flow.order[h] <= first:
        return None
    found = set(backward([h], lambda n: flow.order[n] <= first))
    if x not in found:
        return None
    inside = {x}
    for node in sorted(found, key=flow.order.__getitem__):
        if any(source in inside for source in node.all_input_nodes):
            inside.add(node)
    return frozenset(inside - {x}) if any(is_weighted(flow, n) for n in inside - {x}) else None


def is_weighted(flow: Flow, node: fx.Node) -> bool:
    """Whether a node is more than arithmetic: a linear, a core, a convolution, a nested block."""
    is_layer = has(node, Trait.CONV | Trait.ATTENTION)
    return node in flow.products or node.op == "call_module" or is_layer


def _leaves(flow: Flow, x: fx.Node, h: fx.Node) -> Iterable[fx.Node]:
    """The outputs of sublayers that run side by side and are summed into h, or h alone."""
    inner = strip(h, BETWEEN)
    if op(inner) == "add":
        pair = [n for n in inner.args[:2] if isinstance(n, fx.Node) and is_tensor(n)]
        beside = len(pair) == 2 and all(between(flow, x, n) is not None for n in pair)
        if beside and all(between(flow, a, b) is None for a, b in (pair, pair[::-1])):
            return [leaf for n in pair for leaf in _leaves(flow, x, n)]
    given = _unspread(h)
    return [h] if given is h else _leaves(flow, x, given)


def _unspread(h: fx.Node) -> fx.Node:
    """A sublayer's output before each of several streams is given it, times a number of its own.

    The streams lie beside each other in the one that it is added to (hyper-connections, Zhu et
    al., 2024, arXiv:2409.19606). Others are as they are.
    """
    product = strip(h, Trait.LAYOUT)
    pair = operands(product) if has(product, Trait.SCALING) else []
    for rows, numbers in (pair, pair[::-1]) if len(pair) == 2 else ():
        one, many = sizes(rows), sizes(numbers)
        is_each = len(one) == len(many) > 2 and one[:-2] == many[:-2] and one[-2] == many[-1] == 1
        if is_each and many[-2] != 1 != one[-1] and op(rows) == "unsqueeze":
            return rows.all_input_nodes[0]
    return h


def residual_sites(
    flow: Flow, joins: Sequence[Join], norms: Sequence[Site], roles: Mapping[fx.Node, Site]
) -> list[Site]:
    """The residual sites; ``roles`` are the linears with their roles by their y."""
    normalised = {site.nodes["y"]: site for site in norms}
    readers = Counter(join.x for join in joins)
    sites = []
    for join in joins:
        for h, leaves in join.outputs.items():
            ends = dict.fromkeys(site for leaf in leaves for site in flow.origin(leaf))
            last = [roles[site.nodes["y"]] for site in ends if site.nodes["y"] in roles]
            axis = _features(flow, h, last)
            size = fixed(shape(join.y)[axis])
            facts: dict[str, Any] = {
                **sublayer(last),
                "norm": _norm(flow, join, normalised),
                "parallel": len(join.outputs) > 1 or readers[join.x] > 1,
                "features": axis,
                **({} if size is None else {"width": size}),
            }
            nodes = {"h": h, "x": join.x, "y": join.y}
            if facts["norm"] == "post":
                after = (y for y, norm in normalised.items() if norm.nodes["x"] is join.y)
                nodes["normed"] = next(after)
            module = common([site.module for site in last]) if last else owner(h)
            sites.append(Site("residual", module, None, None, nodes, facts))
    return sites


def _features(flow: Flow, h: fx.Node, last: Sequence[Site]) -> int:
    """The axis of a stream that has the features which these linears add to it."""
    if len(shape(h)) < 4 and not any("pointwise" in site.facts for site in last):
        return -1
    axes = {axis % len(shape(h)) for axis in (flow.axis_at(site, h) for site in last)}
    return axes.pop() if len(axes) == 1 and len(shape(h)) - 1 not in axes else -1


def sublayer(last: Sequence[Site]) -> dict[str, str]:
    """Facts ``after`` and ``kind`` of a sublayer that ends with these linears."""
    roles = {site.role for site in last}
    if roles == {"attn.o"}:
        kinds = {core.facts["kind"] for site in last for core in site.cores}
        return {"after": "attention", **({"kind": kinds.pop()} if len(kinds) == 1 else {})}
    return {"after": "ffn" if "ffn.down" in roles else "other"}


def owner(node: fx.Node) -> str:
    """The module whose weight, or the block whose call, a value was last computed with."""
    while node.op == "call_function" and node.all_input_nodes:
        for source in node.all_input_nodes[1:]:
            if source.op == "get_attr" and len(shape(source)) > 1:
                return str(source.target).rpartition(".")[0]
        node = node.all_input_nodes[0]
    return str(node.target) if node.op == "call_module" else ""


def call_of(node: fx.Node) -> fx.Node | None:
    """The call of a nested block whose output a value is, through layout and dropout; or None."""
    node = strip(node, BETWEEN)
    return node if node.op == "call_module" else None


def _norm(flow: Flow, join: Join, normalised: Mapping[fx.Node, Site]) -> str | None:
    """pre, post, or None for a stream without norms."""
    weighted = [flow.order[n] for n in join.region if is_weighted(flow, n)]
    norms = [flow.order[n] for n in join.region if n in normalised]
    if norms and min(norms) < min(weighted):
        return "pre"
    inputs = {site.nodes["x"] for site in normalised.values()}
    return "post" if join.y in inputs else None
