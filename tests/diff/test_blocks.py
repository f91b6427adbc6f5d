"""Calls of blocks are paired as the blocks are, and what follows from that is told once."""

from __future__ import annotations

import pytest

from peftsurgery.diff.comparison import diff
from tests.diff.models import Layer, Recipe, captured

GELU = Layer(act="gelu")


@pytest.mark.parametrize("place", [0, 1, 3])
def test_the_call_of_a_layer_put_in_is_the_one_that_is_new(place: int) -> None:
    layers = [Layer()] * 3
    layers.insert(place, GELU)
    found = diff(captured(), captured(Recipe(tuple(layers))))
    assert found.script is not None
    top = next(graph for graph in found.script.graphs if graph.places == (("", ""),))
    added = [edit.after for edit in top.edits if edit.before is None]
    assert added == [f"+layers_{place}"]
    assert not [line for line in found.summary.lines if line.part == "graph"]
