"""flattened: the nodes of a whole captured model, those of a block wherever it is called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from operator import getitem
from typing import Any

from torch import fx

from peftsurgery.capture import Capture, Program
from peftsurgery.capture.names import join
from peftsurgery.diff.description import Node, ShapeClass

Keys = tuple[str, ...]
"""The nodes that a value is made by: one, or one for each of a call's results."""


def flattened(capture: Capture, classes: Mapping[str, ShapeClass]) -> dict[str, Node]:
    """The nodes in the order they run, ``module`` a whole path; ``classes`` has each program's."""
    flat = _Flattening(capture, classes)
    flat.put("", capture.programs[""][0], [])
    return flat.nodes


class _Flattening:
    """Grows by the nodes of one program after the other."""

    def __init__(self, capture: Capture, classes: Mapping[str, ShapeClass]) -> None:
        self.capture, self.classes = capture, classes
        self.nodes: dict[str, Node] = {}

    def put(self, path: str, program: Program, given: Sequence[Keys]) -> list[Keys]:
        """Add a program's nodes, called with ``given``; what its results are made by."""
        known = self.classes[program.label].nodes
        inputs, values = iter(given), dict[fx.Node, Keys]()
        for node in program.graph.nodes:
            if node.op == "placeholder" and given:
                values[node] = next(inputs)
            elif node.op == "call_module":
                values[node] = self._call(path, node, values)
            elif node.op == "output":
                return [values[each] for each in node.all_input_nodes]
            elif node.target is getitem and node.args[0].op == "call_module":
                made = values[node.args[0]]
                values[node] = made[node.args[1] : node.args[1] + 1] or made
            else:
                operands = dict.fromkeys(k for each in node.all_input_nodes for k in values[each])
                key = f"{len(self.nodes)}"
                described = known[node.name]
                module = join(path, described.module)
                self.nodes[key] = replace(described, module=module, operands=tuple(operands))
                values[node] = (key,)
        return []

    def _call(self, path: str, node: fx.Node, values: Mapping[fx.Node, Keys]) -> Keys:
        """What a block's results are made by, a node for each."""
        child, label = join(path, str(node.target)), node.kwargs["program"]
        program = next(each for each in self.capture.programs[child] if each.label == label)
        given = [tuple(_keys(each, values)) for each in node.args]
        return tuple(keys[0] for keys in self.put(child, program, given) if keys)


def _keys(value: Any, values: Mapping[fx.Node, Keys]) -> Iterator[str]:
    """The nodes that an argument is made by, in order."""
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    for node in found:
        yield from values[node]
