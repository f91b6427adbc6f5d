"""Nodes that stand for blocks, unfolded: each becomes a copy of what an equal block's call made.

A copy reads the other block's tensors and takes the other call's arguments; it says of itself where
it comes from as if the other block had been traced: which modules' calls made each node
(``nn_module_stack``), and which argument or result of which call it is.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from peftsurgery.capture.equal_blocks.filling_in import BEGINS, BLOCK, ENDS, Passage, Place
from peftsurgery.capture.equal_blocks.out_of_sight import OutOfSightError
from peftsurgery.capture.equal_blocks.size_questions import SYMBOLS
from peftsurgery.capture.kv_cache import REMEMBER
from peftsurgery.capture.loops.traced import INDEX
from peftsurgery.capture.module_calls import GIVEN, RETURNED, hand_on
from peftsurgery.capture.names import join
from peftsurgery.capture.node_copies import copy_node

_ENCLOSING = (BEGINS, ENDS)


@dataclass(frozen=True)
class Filling:
    """The call of a block that does what the passage of that ``number`` does.

    It hands keys and values to the ``layer`` of the cache.
    """

    place: Place
    passage: Passage
    number: int
    layer: int | None


def unfold(graph: fx.Graph, fillings: Sequence[Filling]) -> None:
    """Put copies of passages in place of the nodes that stand for them, in an exported graph."""
    begins, ends = (_by_number(graph, target) for target in _ENCLOSING)
    for node in graph.find_nodes(op="call_function", target=BLOCK):
        filling = fillings[node.args[1]]
        end = ends[filling.number]
        value_of = _copy(node, begins.get(filling.number), end, filling)
        given: Any = end.args[1]
        for pick in list(node.users):
            old = given[pick.args[1]]
            new = value_of.get(old, old)
            hand_on(pick, new)
            pick.replace_all_uses_with(new)
            graph.erase_node(pick)
        graph.erase_node(node)
    for end in ends.values():
        gives: Any = end.args[1]
        graph.erase_node(end)
        for node in gives:
            if node.target is torch.ops.aten.detach.default and not node.users:
                graph.erase_node(node)  # as torch.export does
    for begin in begins.values():
        graph.erase_node(begin)


def _copy(
    call: fx.Node, begin: fx.Node | None, end: fx.Node, filling: Filling
) -> dict[fx.Node, fx.Node]:
    """Copy a passage to where ``call`` stands for it; its nodes and those given, by the copied."""
    taken: Any = end.args[0]
    given: Any = call.args[0]
    value_of: dict[fx.Node, fx.Node] = dict(zip(taken, given, strict=not filling.place.hidden))
    for name, node in zip(filling.place.hidden, taken[len(given) :], strict=False):
        value_of[node] = _own(call, node, name, filling)

    def value(node: fx.Node) -> fx.Node:
        return value_of.get(node, node)

    node = call.graph._root.next if begin is None else begin
    stacks = _Stacks(end, call, filling)
    with call.graph.inserting_before(call):
        while node is not end:
            if not _is_shared(node, value_of):
                made = copy_node(call.graph, node, value)
                _describe(made, node, stacks, filling)
                value_of[node] = made
            node = node.next
    return value_of


def _own(call: fx.Node, like: fx.Node, name: str, to: Filling) -> fx.Node:
    """What reads a parameter of a block that was filled in, as ``like`` reads the other's."""
    old, new = to.passage.place.noted_path, to.place.noted_path
    if like.op != "get_attr" or like.target != join(old, name):
        raise OutOfSightError(f"{join(new, name)} is read as {like.target}")
    with call.graph.inserting_before(call):
        made = call.graph.create_node("get_attr", join(new, name))
    made.meta = dict(like.meta)
    return made


def _by_number(graph: fx.Graph, target: Any) -> dict[Any, fx.Node]:
    return {n.args[-1]: n for n in graph.find_nodes(op="call_function", target=target)}


def _is_shared(node: fx.Node, copied: Container[fx.Node]) -> bool:
    """Whether there is one such node in a graph: torch.export computes a size but once.

    The number of a turn is no size, nor is what is computed of it.
    """
    if isinstance(node.meta.get("val"), SYMBOLS):
        numbers = (n for n in node.all_input_nodes if isinstance(n.meta.get("val"), SYMBOLS))
        return node.target is not INDEX and not any(number in copied for number in numbers)
    return node.op in ("placeholder", "get_attr") or node.target in (
        *_ENCLOSING,
        torch.ops.aten._assert_scalar.default,
    )


def _describe(made: fx.Node, like: fx.Node, stacks: _Stacks, to: Filling) -> None:
    """Let a copy say where it comes from, and to which layer it hands keys and values."""
    if like.target is REMEMBER:
        made.args = (*made.args[:2], to.layer, *made.args[3:])
    for key in (GIVEN, RETURNED):
        marks = made.meta.pop(key, None)
        if marks is None:
            continue
        own = {to.place.moved(to.passage, m): None for m in marks if _is_of(to.passage, m)}
        if own:
            made.meta[key] = own
    if "nn_module_stack" in like.meta:
        made.meta["nn_module_stack"] = stacks.of(like)


def _is_of(passage: Passage, mark: tuple[str, int, int]) -> bool:
    """Whether a value is one of a call within the passage."""
    path, number, _ = mark
    first = passage.place.noted.get(path, 0)
    return first <= number < first + len(passage.calls.get(path, ()))


class _Stacks:
    """The modules that copies come from: those of the call, then those in the passage."""

    def __init__(self, end: fx.Node, call: fx.Node, to: Filling) -> None:
        around, self._own = end.meta["nn_module_stack"], call.meta["nn_module_stack"]
        self._around, self._to = len(around), to
        self._home, self._path = (list(each.values())[-1][0] for each in (around, self._own))
        self._known: dict[Any, dict[str, tuple[str, str]]] = {}

    def of(self, like: fx.Node) -> Mapping[str, tuple[str, str]]:
        """Those of the copy of a node: nodes of one module's call have the same."""
        inner = tuple(like.meta["nn_module_stack"].items())[self._around :]
        if inner not in self._known:
            self._known[inner] = self._own | dict(self._moved(*each) for each in inner)
        return dict(self._known[inner])

    def _moved(self, key: str, entry: tuple[str, str]) -> tuple[str, tuple[str, str]]:
        old, kind = entry
        part = old.removeprefix(self._home)
        name, _, number = key.partition("@")
        now = int(number or 0) + _later(self._to, part)
        new = self._path + part
        return name.removesuffix(old) + new + (f"@{now}" if now else ""), (new, kind)


def _later(to: Filling, part: str) -> int:
    """How many more calls of a part there had been than of its like."""
    first, place = to.passage.place, to.place
    return place.called.get(place.path + part, 0) - first.called.get(first.path + part, 0)
