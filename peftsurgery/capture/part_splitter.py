"""Splitting parts off one block's graph: each becomes a program, and a call of the part.

A part's stretch of the graph are the nodes that its module's forward made (``nn_module_stack``),
and what surgery inserted for them. What a rule makes of a part's *result* where others read it is
not the part's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

from torch import fx

from peftsurgery.capture.blocks import Copier
from peftsurgery.capture.calling import PartCall, pass_on
from peftsurgery.capture.module_calls import GIVEN, RETURNED, Mark, ModuleCall
from peftsurgery.capture.names import join
from peftsurgery.capture.program import Program
from peftsurgery.capture.stack import stack_paths
from peftsurgery.errors import SurgeryError
from peftsurgery.reach import reach

CACHE: Mark = ("", 0, 0)  # the model's cache, which is one for all calls


@dataclass(frozen=True)
class _Owner:
    """A call of a part: its name in the block, and its number among the part's calls."""

    part: str
    number: int


class PartSplitter:
    """Splits the parts that ``calls`` has off a graph, which is changed.

    ``inner`` are the programs of the blocks that the graph calls, by label; ``cache`` is the name
    of the input that is the model's cache. ``lacking`` fills with the arguments that the graph has
    not, and takes as further inputs.
    """

    def __init__(
        self,
        graph: fx.Graph,
        path: str,
        program: Program,
        calls: Mapping[str, Sequence[ModuleCall]],
        inner: Mapping[str, Program],
        cache: str | None,
    ) -> None:
        self.graph, self.path, self.program = graph, path, program
        self.calls, self.inner = calls, inner
        self.lacking: list[Mark] = []
        self._given = _marked(graph, GIVEN)
        for node in graph.find_nodes(op="placeholder"):
            if node.name == cache:
                self._given[CACHE] = node
        self._returned = _marked(graph, RETURNED)
        self._owners = {node: tuple(self._owners_of(node)) for node in _code(graph)}
        self._programs = 0

    def split(self) -> fx.Graph:
        """The graph with the parts called. PSG220 for a part that cannot be told apart."""
        for part, calls in self.calls.items():
            here = {o.number for owners in self._owners.values() for o in owners if o.part == part}
            for number in range(len(calls)):
                if here and number not in here:
                    continue  # made by another call of this block
                self._prepare(part, number, bool(here))
        outputs: Any = self.graph.output_node().args[0]
        single = isinstance(outputs, fx.Node)
        taken = self.graph.find_nodes(op="placeholder")
        return self._build("", _code(self.graph), taken, [outputs] if single else outputs, single)

    def given(self, mark: Mark) -> fx.Node:
        """The node that is an argument of a call, by the part's path in the model.

        If there is none, whatever calls the block is to give it.
        """
        path, number, index = mark
        own = mark if mark == CACHE else (self._home(_beneath(path, self.path)), number, index)
        if own not in self._given:
            last = self.graph.find_nodes(op="placeholder")[-1]
            with self.graph.inserting_after(last):
                self._given[own] = self.graph.placeholder(f"given_{len(self.lacking)}")
            self.lacking.append(mark)
        return self._given[own]

    def _home(self, part: str) -> str:
        """A part's path in the block that the program was first made for: nodes speak of that."""
        return join(self.program.home, part)

    def _prepare(self, part: str, number: int, is_made: bool) -> None:
        """See that there are all arguments of a call, and a node for it. PSG220."""
        path = join(self.path, part)
        leaves = self.calls[part][number].given
        for index, leaf in enumerate(leaves):
            if leaf.kind == "opaque":
                raise unfit(path, f"it is given a {leaf.constant}, which is no value of a graph")
            if leaf.kind == "node":
                self.given((path, number, index))
            if leaf.kind == "cache":
                self.given(CACHE)
        if is_made:
            return
        numbers = [index for index, leaf in enumerate(leaves) if leaf.kind == "node"]
        nodes = [self.given((path, number, index)) for index in numbers]
        if not nodes:
            raise unfit(path, "it computes nothing")
        order = {node: position for position, node in enumerate(self.graph.nodes)}
        with self.graph.inserting_after(max(nodes, key=order.__getitem__)):
            made = self.graph.call_function(pass_on, (nodes[0],))
        around = (o for o in self._owners.get(nodes[0], ()) if part.startswith(f"{o.part}."))
        self._owners[made] = (*around, _Owner(part, number))

    def _owners_of(self, node: fx.Node) -> Iterator[_Owner]:
        """The calls of parts that made a node, outermost first."""
        for key, path in stack_paths(node):
            part = _beneath(path, self.program.home)
            if part in self.calls and not self._is_behind(node, path):
                yield _Owner(part, int(key.rpartition("@")[2]) if "@" in key else 0)
        if node.op == "call_module" and node.target in self.calls:
            same = self.graph.find_nodes(op="call_module", target=str(node.target))
            yield _Owner(str(node.target), same.index(node))

    def _is_behind(self, node: fx.Node, path: str) -> bool:
        """Whether surgery made a node of what a part returned."""
        if "surgery" not in node.meta:
            return False
        results = {other for mark, other in self._returned.items() if mark[0] == path}
        made = reach([node], lambda n: (m for m in n.all_input_nodes if "surgery" in m.meta))
        return any(not results.isdisjoint(found.all_input_nodes) for found in made)

    def _owner(self, node: fx.Node, within: str) -> _Owner | None:
        """The outermost call of a part beneath ``within`` that made a node."""
        for owner in self._owners.get(node, ()):
            if owner.part != within and (not within or owner.part.startswith(f"{within}.")):
                return owner
        return None

    def _build(
        self,
        within: str,
        nodes: Sequence[fx.Node],
        inputs: Sequence[fx.Node],
        outputs: Sequence[Any],
        single: bool,
    ) -> fx.Graph:
        """The graph of a part's (or the block's own) stretch, with the parts in it called."""
        copier = Copier(within, inputs)
        owners = {node: self._owner(node, within) for node in nodes}
        for owner, run in _runs(nodes, owners, lambda part: join(self.path, part)):
            if owner is None:
                for node in run:
                    copier.copy(node)
            else:
                self._call(copier, owner, run, within)
        return copier.finished(outputs, single)

    def _call(self, copier: Copier, owner: _Owner, run: list[fx.Node], within: str) -> None:
        """Insert the call of a part, and the picks of what it gives."""
        call, made = self.calls[owner.part][owner.number], self._stretch(owner, run)
        path, home = join(self.path, owner.part), self._home(owner.part)
        given = [
            None if leaf.kind == "constant" else self._argument(owner, index)
            for index, leaf in enumerate(call.given)
        ]
        beside = [node for node in made.inputs if node not in given]
        values = list(dict.fromkeys(node for node in (*given, *beside) if node is not None))
        results = [self._returned.get((home, owner.number, i)) for i in range(len(call.returned))]
        outputs = [None if n is None else made.position(n) for n in results]
        through = [_passed(call, given, number, node) for number, node in enumerate(results)]
        for leaf, output, passed in zip(call.returned, outputs, through, strict=True):
            if leaf.kind == "opaque" or (leaf.kind == "node" and output is None and passed is None):
                raise unfit(path, "it returns something that is no value of the graph")
        plan = PartCall(
            path,
            _beneath(owner.part, within).rpartition(".")[2],
            call,
            made.program,
            tuple(None if node is None else values.index(node) for node in given),
            tuple(given.index(node) if node in given else None for node in made.inputs),
            tuple(values.index(node) for node in beside),
            tuple(outputs),
            tuple(through),
            len(made.outputs),
            made.single,
        )
        holder = _beneath(owner.part, within).rpartition(".")[0]
        parent = copier.graph.create_node("get_attr", join(holder, "itself"))
        arguments = [copier.value(node) for node in values]
        made_call = copier.graph.call_function(plan, (parent, *arguments))
        copier.take(made_call, made.outputs, made.single)

    def _argument(self, owner: _Owner, index: int) -> fx.Node:
        """The node that is an argument of a call."""
        is_cache = self.calls[owner.part][owner.number].given[index].kind == "cache"
        return self._given[CACHE if is_cache else (self._home(owner.part), owner.number, index)]

    def _given_within(self, node: fx.Node, around: str) -> Iterator[fx.Node]:
        """The arguments of the calls, beneath a part, that made a node."""
        for owner in self._owners[node]:
            if owner.part.startswith(around):
                for index, leaf in enumerate(self.calls[owner.part][owner.number].given):
                    if leaf.kind != "constant":
                        yield self._argument(owner, index)

    def _stretch(self, owner: _Owner, run: list[fx.Node]) -> _Stretch:
        """The program of a call: an inner block's own, or one of the part's stretch."""
        if len(run) == 1 and run[0].op == "call_module" and run[0].target == owner.part:
            return _of_block(run[0], self.inner[str(run[0].kwargs["program"])])
        inside, own = set(run), f"{owner.part}."
        inputs = dict.fromkeys(
            source
            for node in run
            for source in (*node.all_input_nodes, *self._given_within(node, own))
            if source not in inside
            and not (source.op == "get_attr" and str(source.target).startswith(own))
        )
        home = self._home(owner.part)
        results = {n for mark, n in self._returned.items() if mark[:2] == (home, owner.number)}
        outputs = [n for n in run if n in results or any(u not in inside for u in n.users)]
        single = len(outputs) == 1
        graph = self._build(owner.part, run, list(inputs), outputs, single)
        label = f"{self.program.label}/{owner.part}.{owner.number}"
        program = Program(label, graph, owner.part, {}, {}, "")
        return _Stretch(program, list(inputs), outputs, single)


@dataclass(frozen=True)
class _Stretch:
    """A part's program, and the nodes of the graph around it that it takes and gives."""

    program: Program
    inputs: Sequence[fx.Node]
    outputs: Sequence[fx.Node | None]
    single: bool

    def position(self, node: fx.Node) -> int | None:
        """Which of the outputs a node is."""
        return self.outputs.index(node) if node in self.outputs else None


def _of_block(call: fx.Node, program: Program) -> _Stretch:
    """An inner block's program, with what its call takes and gives."""
    returned: Any = program.graph.output_node().args[0]
    inputs = [node for node in call.args if isinstance(node, fx.Node)]
    if isinstance(returned, fx.Node):
        return _Stretch(program, inputs, [call], True)
    picks = {node.args[1]: node for node in call.users if node.target is operator.getitem}
    return _Stretch(program, inputs, [picks.get(i) for i in range(len(returned))], False)


def _passed(
    call: ModuleCall, given: Sequence[fx.Node | None], number: int, node: fx.Node | None
) -> int | None:
    """Which argument a result is, if the part passes it on as it came."""
    kind = call.returned[number].kind
    if kind == "cache":
        return next((i for i, leaf in enumerate(call.given) if leaf.kind == kind), None)
    return given.index(node) if node is not None and node in given else None


def _runs(
    nodes: Sequence[fx.Node], owners: Mapping[fx.Node, _Owner | None], path: Callable[[str], str]
) -> list[tuple[_Owner | None, list[fx.Node]]]:
    """The nodes in an order in which those of one call are together. PSG220 if there is none."""
    runs: list[tuple[_Owner | None, list[fx.Node]]] = []
    for node in nodes:
        if not runs or runs[-1][0] != owners[node]:
            runs.append((owners[node], []))
        runs[-1][1].append(node)
    found = [owner for owner, _ in runs if owner is not None]
    if len(found) == len(set(found)):
        return runs
    return _together(nodes, owners, path)


def _together(
    nodes: Sequence[fx.Node], owners: Mapping[fx.Node, _Owner | None], path: Callable[[str], str]
) -> list[tuple[_Owner | None, list[fx.Node]]]:
    """Sort calls and single nodes by what they need, those that came first being first."""
    groups: dict[Any, list[fx.Node]] = {}
    for node in nodes:
        groups.setdefault(owners[node] or node, []).append(node)
    number = {node: index for index, group in enumerate(groups.values()) for node in group}
    calls, needs = list(groups.items()), TopologicalSorter[int]()
    for index, (_, group) in enumerate(calls):
        sources = {number[s] for node in group for s in node.all_input_nodes if s in number}
        needs.add(index, *(sources - {index}))
    try:
        needs.prepare()
    except CycleError as error:
        cycle = [calls[index][0] for index in error.args[1]]
        torn = next(key.part for key in cycle if isinstance(key, _Owner))
        reason = "what it computes depends on itself by way of other code"
        raise unfit(path(torn), reason) from None
    result: list[tuple[_Owner | None, list[fx.Node]]] = []
    ready: list[int] = []
    while needs.is_active():
        ready = sorted((*ready, *needs.get_ready()))
        first = ready.pop(0)
        key, group = calls[first]
        result.append((key if isinstance(key, _Owner) else None, group))
        needs.done(first)
    return result


def unfit(path: str, reason: str) -> SurgeryError:
    """The refusal of a part that cannot be called by itself."""
    message = f"'{path}' cannot be made a call of its own: {reason}"
    return SurgeryError("PSG220", message, "take a module around it or in it, or the original")


def _beneath(path: str, around: str) -> str:
    """A path as it is called beneath another one; itself if it is not beneath."""
    return path.removeprefix(f"{around}.") if around else path


def _code(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op not in ("placeholder", "output", "get_attr")]


def _marked(graph: fx.Graph, key: str) -> dict[Mark, fx.Node]:
    """The node that is each value of each call; the last, where several are."""
    return {mark: node for node in graph.nodes for mark in node.meta.get(key, ())}
