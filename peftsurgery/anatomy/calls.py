"""Calls: how the programs of a model call each other, and walking values across them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from peftsurgery.anatomy.values import operands
from peftsurgery.capture import Program
from peftsurgery.capture.names import join
from peftsurgery.reach import reach

Programs = Mapping[str, Sequence[Program]]


@dataclass(frozen=True)
class Frame:
    """A program at the path of the block that runs it."""

    path: str
    program: Program


@dataclass(frozen=True)
class CallSite:
    """A call of a block: the caller and the node that calls."""

    frame: Frame
    node: fx.Node


class Calls:
    """The call graph of one capture."""

    def __init__(self, programs: Programs) -> None:
        self.frames = [Frame(path, p) for path, several in programs.items() for p in several]
        self._by_name = {(f.path, f.program.label): f for f in self.frames}
        self._callers: dict[Frame, list[CallSite]] = {}
        calls: dict[Program, list[fx.Node]] = {}
        for frame in self.frames:
            if frame.program not in calls:
                calls[frame.program] = list(frame.program.graph.find_nodes(op="call_module"))
            for node in calls[frame.program]:
                callee = self.callee(frame, node)
                if callee is not None:
                    self._callers.setdefault(callee, []).append(CallSite(frame, node))

    def callers(self, frame: Frame) -> Sequence[CallSite]:
        """Where the block of a frame is called."""
        return self._callers.get(frame, ())

    def callee(self, frame: Frame, node: fx.Node) -> Frame | None:
        """The frame that a call node of ``frame`` enters."""
        label = node.kwargs.get("program")
        return self._by_name.get((join(frame.path, str(node.target)), str(label)))

    def walk(
        self,
        frame: Frame,
        node: fx.Node,
        stop: Callable[[tuple[Frame, fx.Node]], bool] | None = None,
    ) -> Iterator[tuple[Frame, fx.Node]]:
        """Walk backwards from values, across block calls in both directions, up to where to stop.

        Yields (frame, node).
        """
        return reach([(frame, node)], self._sources, stop)

    def _sources(self, value: tuple[Frame, fx.Node]) -> list[tuple[Frame, fx.Node]]:
        frame, node = value
        if node.op == "placeholder":
            return self._arguments(frame, node)
        if node.op == "call_module":
            return self._results(frame, node, None)
        if node.target is operator.getitem and _first(node).op == "call_module":
            return self._results(frame, _first(node), node.args[1])
        return [(frame, source) for source in operands(node)]

    def _arguments(self, frame: Frame, node: fx.Node) -> list[tuple[Frame, fx.Node]]:
        """The values that the callers pass for a placeholder."""
        number = list(frame.program.graph.find_nodes(op="placeholder")).index(node)
        passed = [(call.frame, call.node.args[number]) for call in self.callers(frame)]
        return [(caller, value) for caller, value in passed if isinstance(value, fx.Node)]

    def _results(self, frame: Frame, node: fx.Node, number: object) -> list[tuple[Frame, fx.Node]]:
        """The values a call returns: all of them, or that of a number."""
        callee = self.callee(frame, node)
        if callee is None:
            return []
        result = callee.program.graph.output_node().args[0]
        values = list(result) if isinstance(result, (list, tuple)) else [result]
        chosen = [values[number]] if isinstance(number, int) else values
        return [(callee, value) for value in chosen if isinstance(value, fx.Node)]


def _first(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]
