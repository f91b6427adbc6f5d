"""A graph's outline, told of the nodes it would be copied from, is the description of the copy."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

import peftsurgery as ps
from peftsurgery.capture.blocks import Library
from peftsurgery.capture.node_copies import copy_node
from peftsurgery.capture.outlines import Outline, describe
from peftsurgery.capture.program import Program
from tests.models.zoo import entry

captures = importlib.import_module("peftsurgery.capture.captures")


@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral", "bart", "swin", "functional"])
def test_an_outline_is_the_description_of_the_copy(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []

    class Comparing(Library):
        """Copies every block, known or not."""

        def intern(self, outline: Outline, make: Callable[[], fx.Graph], *of: Any) -> Program:
            graph = make()
            assert outline.lines == describe(graph)
            reads = [str(node.target) for node in graph.find_nodes(op="get_attr")]
            assert outline.reads == reads
            compared.append(of[-1])
            return super().intern(outline, make, *of)

    monkeypatch.setattr(captures, "Library", Comparing)
    inputs = entry(name).inputs(2, 6)
    blocks = ps.capture(entry(name).make(), inputs=inputs).captures[0].programs
    assert set(compared) == set(blocks)


def test_graphs_that_differ_have_other_outlines() -> None:
    def traced(function: Callable[..., Any]) -> fx.Graph:
        return fx.symbolic_trace(function).graph

    like = describe(traced(lambda x, y: (x - y) * 2))
    assert like == describe(traced(lambda first, second: (first - second) * 2))
    others = (lambda x, y: (y - x) * 2, lambda x, y: (x - y) * 2.0, lambda x, y: (x + y) * 2)
    for other in (*others, lambda x, y: ((x - y) * 2,), lambda x, y: x - y):
        assert like != describe(traced(other))


def test_a_copy_is_the_node_that_fx_copies() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x", type_expr=torch.Tensor)
    bounds = [slice(None, x), (x, 1)]
    node = graph.call_function(torch.add, (x, bounds), {"alpha": x}, torch.Tensor)
    node.meta["val"] = [1]
    other = fx.Graph()
    given = other.placeholder("given")
    theirs = other.node_copy(node, {x: given}.__getitem__)
    ours = copy_node(other, node, {x: given}.__getitem__)
    assert ours.name != theirs.name
    told = [(n.op, n.target, n.args, n.kwargs, n.type, n.meta) for n in (ours, theirs)]
    assert told[0] == told[1]
    assert given.users == {theirs: None, ours: None}
    ours.meta["own"] = True
    assert "own" not in node.meta
