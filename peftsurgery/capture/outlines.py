"""What a graph would say, line by line, told of the nodes that it would be copied from.

Of blocks that are equal one graph is made: the others need but be known as equal.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx


class Outline:
    """The lines of a graph for the module at ``path``: equal for graphs that differ in node names.

    ``inputs`` are the nodes that the graph takes, ``reads`` the names of the tensors that it reads.
    """

    def __init__(self, path: str = "", inputs: Iterable[fx.Node] = ()) -> None:
        self.lines: list[tuple[str, ...]] = []
        self.reads: list[str] = []
        self._index: dict[fx.Node, str] = {}
        self._prefix = f"{path}." if path else ""
        for node in inputs:
            self._say(node, "placeholder", "", ())

    def add(self, node: fx.Node) -> None:
        """Say what a copy of a node does, and before it which tensors it reads first."""
        if node in self._index:
            return
        for source in node.all_input_nodes:
            self._see(source)
        target = str(node.target)
        if node.op == "call_module":
            target = target.removeprefix(self._prefix)
        if node.op == "placeholder":
            target = ""
        self._say(node, node.op, target, node.args, node.kwargs)

    def call(
        self, path: str, label: str, inputs: Iterable[fx.Node], outputs: Sequence[Any], single: bool
    ) -> None:
        """Say that a block is called, and that its outputs are picked if it has several."""
        call = fx.Graph().placeholder("call")
        given = tuple(map(self._see, inputs))
        target = path.removeprefix(self._prefix)
        self._say(call, "call_module", target, given, {"program": label})
        for number, node in enumerate(outputs):
            if node is not None and single:
                self._index[node] = self._index[call]
            elif node is not None:
                self._say(node, "call_function", str(operator.getitem), (call, number))

    def end(self, outputs: Sequence[Any], single: bool) -> None:
        """Say what the graph returns: these values, or the one value itself."""
        for node in outputs:
            if isinstance(node, fx.Node):
                self._see(node)
        results = tuple(outputs)
        self._say(None, "output", "output", (results[0] if single else results,))

    def _see(self, node: fx.Node) -> fx.Node:
        """A node; a tensor read is said here when it is first needed."""
        if node not in self._index and node.op == "get_attr":
            name = str(node.target).removeprefix(self._prefix)
            self.reads.append(name)
            self._say(node, "get_attr", name, ())
        return node

    def _say(
        self,
        node: fx.Node | None,
        op: str,
        target: str,
        args: Any,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        said = fx.map_arg((args, kwargs or {}), self._index.__getitem__)
        if node is not None:
            self._index[node] = f"%{len(self.lines)}"
        self.lines.append((op, target, repr(said)))


def describe(graph: fx.Graph) -> Sequence[tuple[str, ...]]:
    """Canonical description of a graph: equal for graphs that differ in node names alone."""
    outline = Outline()
    for node in graph.nodes:
        outline.add(node)
    return outline.lines
