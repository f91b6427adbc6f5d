"""Three traced turns of a loop, folded to the nodes of one, if they are alike node by node.

What a turn reads is its own, or comes from before the loop, or from the turn before. From before
the loop, all turns read the same; where the first reads something from there, and each other the
same value of the turn before it, that is carried. What leaves the loop is what its last turn made,
or what every turn made at one place, joined. Anything else is no repetition, and the loop is not
kept (LoopError).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from peftsurgery.capture.loops import running
from peftsurgery.capture.loops.traced import INDEX, JOINED, TURN, TURNS, LoopError
from peftsurgery.capture.schemas import op
from peftsurgery.capture.stack import inherit

_SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)
_ASSERT = torch.ops.aten._assert_scalar.default
_ASSERT_KIND = torch.ops.aten._assert_tensor_metadata.default
_OF_SIZES = ("_operator", "math", "torch")
# With a weight they are sites: what a rule puts there is made once in a call, and not in a turn.
_PRODUCTS = {
    *("linear", "matmul", "mm", "bmm", "mv", "dot", "addmm", "addmv", "baddbmm", "einsum"),
    *("conv1d", "conv2d", "conv3d", "convolution", "embedding", "tensordot", "inner", "bilinear"),
    *("scaled_dot_product_attention", "lstm", "gru", "lstm_cell", "gru_cell"),
}


@dataclass(frozen=True)
class _TurnRead:
    """What a turn reads: ``place`` among its own nodes, or among those of the turn before.

    With ``first`` it is carried: the first turn reads that. Without a place, it is ``first``, from
    before the loop.
    """

    place: int | None = None
    first: fx.Node | None = None


def fold_loops(graph: fx.Graph) -> None:
    """Fold the turns of every loop of an exported graph, in place. LoopError if they are unlike."""
    loops: list[_Loop] = []
    open_marks: dict[int, list[fx.Node]] = {}
    latest: dict[Any, _Loop] = {}
    for node in graph.nodes:
        args: Any = node.args
        if node.target is TURN:
            number, turn = args[2:]
            marks = open_marks.setdefault(number, [])
            if turn != len(marks):
                raise LoopError("the turns of a loop are not in order")
            marks.append(node)
            if turn == TURNS:
                latest[number] = _Loop(graph, open_marks.pop(number))
                loops.append(latest[number])
        elif node.target is JOINED:
            if args[1] not in latest:
                raise LoopError("what a loop makes is joined before its end")
            latest[args[1]].joins.append(node)
    if open_marks:
        raise LoopError("a loop has no end")
    for loop in loops:
        try:
            loop.fold()
        except LoopError as error:
            raise LoopError(str(error), loop.number) from error


@dataclass(eq=False)
class _Loop:
    """A loop of three turns, between four marks, with the nodes that join what they made."""

    graph: fx.Graph
    marks: Sequence[fx.Node]
    joins: list[fx.Node] = field(default_factory=list)
    carried: dict[_TurnRead, fx.Node] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """Which loop of the trace it is."""
        number: Any = self.marks[0].args[2]
        return int(number)

    @cached_property
    def own(self) -> list[list[fx.Node]]:
        """The nodes of each turn. What is but a number of the inputs is moved before the loop."""
        found: list[list[fx.Node]] = [[] for _ in range(TURNS)]
        within: set[fx.Node] = set()
        turn, node = 0, self.marks[0].next
        while node is not self.marks[-1]:
            following = node.next
            if node is self.marks[turn + 1]:
                turn += 1
            elif node.target is _ASSERT_KIND:  # clean-up drops them all
                self.graph.erase_node(node)
            elif self._is_outer(node) and within.isdisjoint(node.all_input_nodes):
                self.marks[0].prepend(node)
            else:
                within.add(node)
                found[turn].append(node)
            node = following
        return found

    def _is_outer(self, node: fx.Node) -> bool:
        is_number = isinstance(node.meta.get("val"), _SIZES) and node.target is not INDEX
        return is_number or node.op == "get_attr" or node.target is _ASSERT

    @cached_property
    def places(self) -> dict[fx.Node, tuple[int, int]]:
        """Of every node: its turn, and its place there."""
        return {n: (t, p) for t, nodes in enumerate(self.own) for p, n in enumerate(nodes)}

    def source(self, nodes: Sequence[Any]) -> _TurnRead:
        """What the turns read, one node each. LoopError if it is not one thing for all turns."""
        own = [self.places.get(node) for node in nodes]
        if all(place is None for place in own) and len(set(nodes)) == 1:
            return _TurnRead(first=nodes[0])
        match own:
            case [(0, a), (1, b), (2, c)] if a == b == c:
                return _TurnRead(a)
            case [None, (0, b), (1, c)] if b == c:
                if _kind(nodes[0]) != _kind(nodes[1]):
                    raise LoopError("what is carried changes its kind or its sizes")
                return _TurnRead(b, nodes[0])
        raise LoopError("the turns read different things")

    def sources(self, arguments: Sequence[Any]) -> list[_TurnRead]:
        """What the arguments of alike nodes read. LoopError if they are not alike."""
        told = [repr(fx.map_arg(argument, lambda _: None)) for argument in arguments]
        read = [_nodes(argument) for argument in arguments]
        if len(set(told)) > 1 or len({len(nodes) for nodes in read}) > 1:
            raise LoopError("the turns compute different things")
        return [self.source(nodes) for nodes in zip(*read, strict=True)]

    def check(self) -> None:
        """LoopError if the turns are not alike, or more leaves the loop than can be followed."""
        if len({len(nodes) for nodes in self.own}) > 1:
            raise LoopError("the turns take different numbers of steps")
        symbols = self._symbols()
        for alike in zip(*self.own, strict=True):
            if len({node.target for node in alike}) > 1 or not _is_followed(alike[0]):
                raise LoopError("a turn has a step of its own")
            if len({_told(node, symbols) for node in alike}) > 1:
                raise LoopError("the turns make values of different kinds")
            if alike[0].target is not INDEX:
                for source in self.sources([(node.args, node.kwargs) for node in alike]):
                    is_outer = source.place is None and source.first is not None
                    if is_outer and op(alike[0]) in _PRODUCTS and _is_weight(source.first):
                        raise LoopError("a turn has a product with a weight")
        self.sources([mark.args[0] for mark in self.marks[1:]])
        inside = {*self.places, *self.marks, *self.joins}
        for node, (turn, _) in self.places.items():
            if not inside.issuperset(node.users) and (turn < TURNS - 1 or _has(node, symbols)):
                raise LoopError("a value of one turn is read behind the loop")

    def _symbols(self) -> list[str]:
        """The names of the turns' numbers, as far as they are read."""
        found = [node for nodes in self.own for node in nodes if node.target is INDEX]
        return [str(node.meta["val"].node.expr) for node in found]

    def fold(self) -> None:
        """Leave the nodes of one turn, in a loop. LoopError if the turns are not alike."""
        self.check()
        last = self.own[-1]
        kept = [self.source(_nodes(join.args[0])) for join in self.joins]
        read = [
            self.sources([(n.args, n.kwargs) for n in a]) if a[0].target is not INDEX else []
            for a in zip(*self.own, strict=True)
        ]
        begin = self._node(running.loop_begins, (self.marks[0].args[1],), self.marks[-2])
        for node, sources in zip(last, read, strict=True):
            if node.target is INDEX:
                node.target, node.args = running.loop_index, (begin,)
                continue
            _read_instead(node, [self._value(source, begin) for source in sources])
        values = [self._value(source, begin) for source in kept]
        carried = [last[source.place] for source in self.carried if source.place is not None]
        end = self._node(running.loop_turns, (begin, carried, values), self.marks[-1])
        for number, (join, value) in enumerate(zip(self.joins, values, strict=True)):
            join.target = running.loop_joined
            join.args = (end, value, number, *join.args[2:])
        for node in (*self.marks, *reversed(self.own[1]), *reversed(self.own[0])):
            self.graph.erase_node(node)

    def _value(self, source: _TurnRead, begin: fx.Node) -> fx.Node:
        """What a source is in the one turn that is left."""
        if source.place is None:
            assert source.first is not None
            return source.first
        if source.first is None:
            return self.own[-1][source.place]
        if source not in self.carried:
            args = (begin, source.first, len(self.carried))
            node = self._node(running.loop_carried, args, begin.next)
            node.meta["val"] = source.first.meta.get("val")
            self.carried[source] = node
        return self.carried[source]

    def _node(self, target: Any, args: tuple[Any, ...], before: fx.Node) -> fx.Node:
        """A new node of the loop's; a loop stands for the number of its turns."""
        count: Any = self.marks[0].args[1]
        with self.graph.inserting_before(before):
            made = self.graph.call_function(target, args)
        inherit(made, self.marks[-1])
        made.meta["val"] = count.meta["val"]
        return made


def _nodes(argument: Any) -> list[fx.Node]:
    """The nodes in an argument, in order, as often as they are there."""
    found: list[fx.Node] = []
    fx.map_arg(argument, found.append)
    return found


def _read_instead(node: fx.Node, values: Sequence[fx.Node]) -> None:
    """Let a node read other values, in the order in which it reads some now."""
    others = iter(values)
    node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda _: next(others))


def _is_followed(node: fx.Node) -> bool:
    """Whether a step is an operator of torch, or arithmetic on sizes."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace == "aten" or target is INDEX
    return node.op == "call_function" and getattr(target, "__module__", None) in _OF_SIZES


def _is_weight(node: Any) -> bool:
    """Whether a value is made of the model's tensors alone."""
    if node.op == "get_attr":
        return True
    return bool(node.all_input_nodes) and all(map(_is_weight, node.all_input_nodes))


def _kind(node: fx.Node) -> str:
    """Dtype, device and sizes of a value, as a text, since comparing symbols would add guards."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return repr(
        [
            (leaf.dtype, leaf.device, [*map(str, leaf.shape)])
            if isinstance(leaf, torch.Tensor)
            else type(leaf)
            for leaf in leaves
        ]
    )


def _told(node: fx.Node, symbols: Sequence[str]) -> str:
    """The kind of a value, whatever turn it is of."""
    text = _kind(node)
    for symbol in symbols:
        text = re.sub(rf"\b{symbol}\b", "turn", text)
    return text


def _has(node: fx.Node, symbols: Sequence[str]) -> bool:
    """Whether the sizes of a value go by the number of its turn, or it is such a number."""
    value = node.meta.get("val")
    return isinstance(value, _SIZES) or _told(node, symbols) != _kind(node)
