"""A swap of the last two axes is known by what it does, however it is spelled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from peftsurgery.anatomy.values import is_swap, parameter_of

aten = torch.ops.aten
SWAPS = [
    (aten.transpose.int, (-2, -1)),
    (aten.transpose.int, (1, 0)),
    (aten.swapaxes.default, (0, 1)),
    (aten.swapdims.default, (0, 1)),
    (aten.permute.default, ([1, 0],)),
    (aten.movedim.int, (0, 1)),
    (aten.t.default, ()),
    (aten.numpy_T.default, ()),
    (aten.mT.default, ()),
    (aten.adjoint.default, ()),
]
OTHERS = [
    (aten.permute.default, ([0, 1],)),
    (aten.view.default, ([3, 2],)),
    (aten.reshape.default, ([3, 2],)),
    (aten.unsqueeze.default, (0,)),
    (aten.contiguous.default, ()),
    (aten.neg.default, ()),
]


def node(target: Any, arguments: tuple[Any, ...], example: Tensor) -> fx.Node:
    """A call of an operator on a parameter."""
    graph = fx.Graph()
    read = graph.get_attr("W")
    made = graph.call_function(target, (read, *arguments))
    read.meta["val"], made.meta["val"] = example, target(example, *arguments)
    return made


@pytest.mark.parametrize(("target", "arguments"), SWAPS, ids=str)
def test_every_spelling_of_a_transposition_is_one(target: Any, arguments: Any) -> None:
    for example in (torch.zeros(2, 3), torch.zeros(3, 3)):
        called = node(target, arguments, example)
        assert is_swap(called)
        assert parameter_of(called) == (called.args[0], True)


@pytest.mark.parametrize(("target", "arguments"), OTHERS, ids=str)
def test_nothing_else_is(target: Any, arguments: Any) -> None:
    assert not is_swap(node(target, arguments, torch.zeros(2, 3)))


def test_other_axes_than_the_last_are_no_swap() -> None:
    cube = torch.zeros(3, 3, 3)
    assert not is_swap(node(aten.transpose.int, (0, 1), cube))
    assert is_swap(node(aten.transpose.int, (1, 2), cube))
    assert is_swap(node(aten.permute.default, ([0, 2, 1],), cube))
