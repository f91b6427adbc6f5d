"""Dataflow facts of one program's graph, computed once: order, linears, origins.

The *origin* of a value is the linear it comes from through layout, scaling, norms, dropout, rotary
arithmetic, and short convolutions that leave channels apart: the query operand of an attention core
has the query projection for its origin. A value that mixes several signals (the residual stream)
has none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import fx

from peftsurgery.anatomy.convs import find_pointwise
from peftsurgery.anatomy.experts import find_experts
from peftsurgery.anatomy.fused_rows import (
    OpaqueError,
    arriving,
    arriving_axis,
    is_depthwise,
    most_entries,
)
from peftsurgery.anatomy.linears import find_linears
from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.site import Site, features_dim
from peftsurgery.anatomy.values import backward, operands, sizes, strip, value, width
from peftsurgery.anatomy.written_memory import written
from peftsurgery.capture.loops.running import left_before
from peftsurgery.reach import reach

Origin = frozenset[Site]
NONE: Origin = frozenset()
LIGHT = Trait.LAYOUT | Trait.SCALING | Trait.DROPOUT | Trait.NORM
"""What keeps a signal what it is."""


class Flow:
    """A program's graph with the answers that every finder of sites asks for."""

    def __init__(self, graph: fx.Graph, parameters: Collection[str]) -> None:
        """``parameters`` are the names of the tensors that may be weights; others are constants."""
        self.graph = graph
        self.nodes: Sequence[fx.Node] = tuple(graph.nodes)
        self.order = {node: index for index, node in enumerate(self.nodes)}
        found = find_linears(graph, parameters) | find_experts(graph, parameters)
        found |= find_pointwise(self.nodes, parameters)
        self.products = {node: found[node] for node in sorted(found, key=self.order.__getitem__)}
        self.linears = [s for s in self.products.values() if features_dim(s) == -1]
        self._origins: dict[fx.Node, Origin] = {}
        self._mixed: set[fx.Node] = set()
        self._sources: dict[fx.Node, list[fx.Node]] = {}
        for node in self.nodes:
            self._trace(node)

    def origin(self, node: fx.Node) -> Origin:
        """The linears whose output this value is; empty if there is none or it is a mixture."""
        return NONE if node in self._mixed else self._origins.get(node, NONE)

    @cached_property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The nodes that the program returns."""
        return tuple(self.graph.output_node().all_input_nodes)

    @cached_property
    def by_input(self) -> dict[fx.Node, list[Site]]:
        """The linears that read a value as their ``x``, at either side of a view to rows."""
        readers: dict[fx.Node, list[Site]] = {}
        for product, site in self.products.items():
            for x in {site.nodes["x"], *operands(product)}:
                if x is not site.nodes["W"]:
                    readers.setdefault(x, []).append(site)
        return readers

    def between(self, source: fx.Node, target: fx.Node) -> list[fx.Node]:
        """What ``target`` is computed from up to ``source``, in the graph's order."""
        found = backward([target], lambda n: n is source or n in self.products)
        return sorted(found, key=self.order.__getitem__)

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """Direct sources: operands, and what is written into a value or left to it by a turn."""
        if node not in self._sources:
            self._sources[node] = [*operands(node), *written(node), *left_before(node)]
        return self._sources[node]

    def made_of(self, node: fx.Node, stop: Callable[[fx.Node], bool]) -> list[fx.Node]:
        """All values that one is computed from or written with, up to where ``stop`` holds."""
        return list(reach([node], self.sources, stop))

    def upto_weights(self, node: fx.Node) -> list[fx.Node]:
        """Values that one is computed from, up to the nearest linears."""
        found = self.made_of(node, lambda n: n in self.products)
        return [n for n in found if n not in self.products]

    def rows(
        self, site: Site, target: fx.Node, beside: bool = False
    ) -> dict[bool, set[int]] | None:
        """The rows of a linear's output that arrive at a value; None if they cannot be followed.

        With ``beside``, also where they are joined to other values on their way.
        """
        try:
            way, axis = self.between(site.nodes["y"], target), features_dim(site)
            return arriving(site.nodes["y"], target, way, beside, axis)
        except OpaqueError:
            return None

    def rows_at(self, site: Site, target: fx.Node, beside: bool = False) -> set[int]:
        """The same rows, whether activated or not; none if they cannot be followed."""
        return set().union(*(self.rows(site, target, beside) or {}).values())

    def entries_of_a_row(self, site: Site, target: fx.Node) -> int:
        """In how many entries of a value a row of a linear is, at most; 0 if in none, or untold."""
        try:
            way, axis = self.between(site.nodes["y"], target), features_dim(site)
            return most_entries(site.nodes["y"], target, way, axis)
        except OpaqueError:
            return 0

    def axis_at(self, site: Site, target: fx.Node) -> int:
        """The axis of a value that has the features of a linear's output; the last if untold."""
        try:
            way = self.between(site.nodes["y"], target)
            return arriving_axis(site.nodes["y"], target, way, features_dim(site))
        except OpaqueError:
            return -1

    def is_signal(self, node: fx.Node) -> bool:
        """Whether a value is data in floating point, not a mask, a table or a position."""
        found = value(node)
        return isinstance(found, torch.Tensor) and found.is_floating_point()

    def _trace(self, node: fx.Node) -> None:
        site = self.products.get(node)
        if site is not None:
            self._origins[node] = self._origins[site.nodes["y"]] = frozenset((site,))
            return
        if node.op != "call_function" or node in self._origins:
            return
        channels = operands(node)[:1] if is_depthwise(node) else []
        if has(node, Trait.OPAQUE) and not channels:
            return
        inputs = channels or self._weighed(node) or operands(node)
        known = [self._origins[n] for n in inputs if n in self._origins]
        if any(n in self._mixed for n in inputs) or self._mixes(node, inputs, known):
            self._mixed.add(node)
        if known:
            self._origins[node] = frozenset().union(*known)
        if node in self._mixed:
            self._origins[node] = NONE

    def _weighed(self, node: fx.Node) -> list[fx.Node]:
        """What a node multiplies by numbers that are no second signal; nothing if they may be one.

        They are how much the router wants an expert, one for each of its rows; or how much of what
        another linear makes is wanted, one for each token (the shared expert of Qwen2-MoE); or are
        the same for all tokens: the gate and the scale of an adaptive norm (DiT, Peebles and Xie,
        2023, §3.2).
        """
        inputs = operands(node)
        if has(node, Trait.SCALING) and len(inputs) == 2:
            for rows, numbers in (inputs, inputs[::-1]):
                known = self.origin(rows)
                if known and all(s.kind == "experts" for s in known) and width(numbers) == 1:
                    return [rows]
                if known and all(_makes_tokens(s, rows) for s in known):
                    is_each = sizes(numbers) == (*sizes(rows)[:-1], 1)
                    if is_each and has(strip(numbers, LIGHT), Trait.ACTIVATION):
                        return [rows]
                if sizes(rows) == sizes(node) and is_of_all_tokens(numbers, rows):
                    return [rows]
        return []

    def _mixes(self, node: fx.Node, inputs: Sequence[fx.Node], known: Sequence[Origin]) -> bool:
        if has(node, Trait.LAYOUT):
            return False  # a concatenation has all the origins of its pieces
        if len({_signals(origin) for origin in known}) > 1:
            return True
        if not has(node, Trait.ADDITION) or not known:
            return False
        return any(n not in self._origins and is_stream(n) for n in inputs)


def _signals(origin: Origin) -> frozenset[Any]:
    """What tells the signals of an origin apart: the experts of one stack, in a loop, are one."""
    return frozenset(site.parameter if site.kind == "experts" else site for site in origin)


def _makes_tokens(site: Site, rows: fx.Node) -> bool:
    """Whether the last axis of a value has all that a linear makes of a token, and more than one.

    Where it has a head's features alone, numbers are that head's.
    """
    return features_dim(site) == -1 and width(rows) == site.facts["out"] != 1


def is_of_all_tokens(numbers: fx.Node, rows: fx.Node) -> bool:
    """Whether numbers are one for each feature of each text, and none for single tokens."""
    few, many = sizes(numbers), sizes(rows)
    return len(few) == len(many) > 2 and few[::2] == many[::2] and few[1] == 1 != many[1]


def is_stream(node: fx.Node) -> bool:
    """Whether a value without origin may be a residual stream: it is batched, wide and computed."""
    found = value(node)
    if not isinstance(found, torch.Tensor) or not found.is_floating_point() or found.dim() < 2:
        return False
    return all(n.op != "get_attr" for n in backward([node], lambda n: not has(n, LIGHT)))


def forward(start: Iterable[fx.Node], through: Trait) -> list[fx.Node]:
    """The values computed from ``start`` by such operators alone, themselves included."""
    return list(reach(start, lambda node: (n for n in node.users if has(n, through))))
