"""The lines that made a node, beside those that torch.export notes."""

from __future__ import annotations

import re

import torch
from torch import Tensor, fx, nn

import peftsurgery as ps


class Inner(nn.Module):
    """A step in a module of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of any shape."""
        y = torch.sin(x)
        return y * 2


class Outer(nn.Module):
    """A module with a part, and a step of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of any shape."""
        return torch.cos(self.inner(x))


def test_nodes_know_the_lines_that_torch_export_knows() -> None:
    x = torch.ones(2, 3)
    exported = torch.export.export(Outer(), (x,)).graph
    captured = ps.capture(Outer(), inputs={"x": x}).captures[0].top.graph
    mine, theirs = _lines(captured), _lines(exported)
    assert mine == theirs
    assert mine["cos"][-1].endswith("return torch.cos(self.inner(x))")
    assert mine["sin"][-1].endswith("y = torch.sin(x)")


def _lines(graph: fx.Graph) -> dict[str, list[str]]:
    """The lines in this file behind each node, outermost first."""
    own = re.compile(rf'  File "{re.escape(__file__)}", line \d+, in forward\n.*')
    return {
        node.name: own.findall("  " + node.meta["stack_trace"])
        for node in graph.nodes
        if str(node.target).startswith("aten.")
    }
