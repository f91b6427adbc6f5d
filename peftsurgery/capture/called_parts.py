"""Parts that are called: programs in which chosen modules are called as in the original.

In a captured model only blocks are called; what other modules do is in the block around them. Once
something waits for such a module to be called (a hook, a module put in its place), the stretch of
the graph that its code made becomes a program of its own, and the program around it calls the
module with the original's arguments, by position and name, and takes the original's result from it.

    linear(x, q_proj.weight)      ->      q_proj(x)  -- hooks --  linear(x, weight)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import fx

from peftsurgery.capture.captures import Capture
from peftsurgery.capture.module_calls import Mark, ModuleCall
from peftsurgery.capture.names import join
from peftsurgery.capture.part_splitter import PartSplitter, unfit
from peftsurgery.capture.program import Program


def with_calls(capture: Capture, parts: Collection[str], number: int) -> Capture:
    """Make a capture whose programs call these parts as modules; ``number`` labels the programs.

    Modules that the original does not call in this capture are not called here either. PSG220 for
    a part whose stretch of the graph cannot be told apart.
    """
    wanted = frozenset(path for path in parts if path in capture.calls)
    return _Programs(capture, wanted, number).capture_with_calls() if wanted else capture


class _Programs:
    """Programs of a capture, rebuilt top-down, one for each call site."""

    def __init__(self, capture: Capture, parts: frozenset[str], number: int) -> None:
        self.capture, self.parts, self.number = capture, parts, number
        self.made: dict[str, list[Program]] = {}
        self.lacking: dict[str, list[Mark]] = {}
        self.cache = None if capture.call.past is None else capture.call.past.name

    def capture_with_calls(self) -> Capture:
        top = self.program("", self.capture.top)
        lacking = self.lacking[top.label]
        if lacking:
            path, _, index = lacking[0]
            raise unfit(path, f"nothing needs value {index} of its arguments, so it is not there")
        programs = {path: tuple(made) for path, made in self.made.items()}
        return replace(self.capture, programs=programs)

    def program(self, path: str, program: Program) -> Program:
        """The program of the block at ``path``, with calls in it and in the blocks it calls."""
        if path and not any(part.startswith(f"{path}.") for part in self.parts):
            self.lacking.setdefault(program.label, [])
            self.made.setdefault(path, []).append(program)
            return program
        graph = _copied(program.graph)
        inner: dict[str, Program] = {}
        calls = graph.find_nodes(op="call_module")
        for call in calls:
            block = join(path, str(call.target))
            known = {each.label: each for each in self.capture.programs[block]}
            new = self.program(block, known[str(call.kwargs["program"])])
            call.kwargs = {**call.kwargs, "program": new.label}
            inner[new.label] = new
        splitter = PartSplitter(graph, path, program, self.calls_of(path), inner, self.cache)
        for call in calls:
            more = [splitter.given(mark) for mark in self.lacking[str(call.kwargs["program"])]]
            call.args = (*call.args, *more)
        count = sum(map(len, self.made.values()))
        made = program.rewritten(f"{program.label}/called.{self.number}.{count}", splitter.split())
        self.lacking[made.label] = splitter.lacking
        self.made.setdefault(path, []).append(made)
        return made

    def calls_of(self, path: str) -> Mapping[str, Sequence[ModuleCall]]:
        """The calls of the wanted parts in the program of a block, by their names in it."""
        mine = {}
        for part in self.parts:
            around = [b for b in self.capture.programs if b and part.startswith(f"{b}.")]
            if max(around, key=len, default="") == path:
                mine[part.removeprefix(f"{path}.") if path else part] = self.capture.calls[part]
        return mine


def _copied(graph: fx.Graph) -> fx.Graph:
    """A copy whose nodes have metadata of their own."""
    copy, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    copy.output(copy.graph_copy(graph, copies))
    for node, made in copies.items():
        made.meta = dict(node.meta)
    return copy
