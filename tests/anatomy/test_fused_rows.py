"""The rows of a weight that arrive at a value are those that its gradient depends on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from peftsurgery.anatomy import Slice
from peftsurgery.anatomy.fused_rows import OpaqueError, arriving, as_slice

ROWS = 12


def mixed(y: Tensor) -> Tensor:
    """Three groups of four features, each mixed with its own and those of the token before."""
    return F.conv1d(F.pad(y.mT, (1, 0)), torch.ones(ROWS, 4, 2), groups=3).mT


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "a third": lambda y: y.chunk(3, -1)[1],
    "every third": lambda y: y.unflatten(-1, (4, 3))[..., 1],
    "heads of three": lambda y: y.unflatten(-1, (2, 3, 2)).transpose(1, 2)[..., 2, :],
    "a rotated half": lambda y: torch.cat((-y[..., 3:6], y[..., :3]), -1),
    "a half beside its turn": lambda y: y[..., :4] * 0.5 + y[..., :4].flip(-1),
    "narrowed": lambda y: y.narrow(-1, 5, 2) * 2 + 1,
    "selected": lambda y: y.select(-1, 7)[..., None],
    "repeated": lambda y: y[..., 8:].repeat_interleave(3, -1),
    "the greatest of tokens": lambda y: y[:, :4, 4:8].unflatten(1, (2, 2)).max(2).values,
    "the mean of tokens": lambda y: y[..., 3:6].mean(1),
    "the sum over heads and tokens": lambda y: y.unflatten(-1, (4, 3))[:, :, 1:2].sum((1, 2), True),
    "of length one": lambda y: F.normalize(y[..., 2:6], dim=-1),
    "padded": lambda y: F.pad(y[..., 3:5], (1, 2, 4, 0)),
    "a group of those that are mixed": lambda y: mixed(y)[..., 4:8],
    "turned": lambda y: y.mT.reshape(2, ROWS, 5)[:, 4:6],
}
GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "the first half": lambda y: F.silu(y[..., :6]) * y[..., 6:],
    "the second": lambda y: y[..., :6] * torch.sigmoid(y[..., 6:]),
    "glu": lambda y: F.glu(y, -1),
}


class Way(nn.Module):
    """Something done to the output of a linear."""

    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.way = way

    def forward(self, y: Tensor) -> Tensor:
        return self.way(y)


def found_by(way: Callable[[Tensor], Tensor]) -> dict[bool, set[int]]:
    graph = torch.export.export(Way(way), (torch.randn(2, 5, ROWS),)).graph
    (source,) = graph.find_nodes(op="placeholder")
    target = graph.output_node().args[0][0]
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    assert isinstance(target, fx.Node)
    return arriving(source, target, nodes)


@pytest.mark.parametrize("name", WAYS)
def test_rows_arrive_from_where_the_gradient_goes(name: str) -> None:
    y = torch.randn(2, 5, ROWS, requires_grad=True)
    (gradient,) = torch.autograd.grad((WAYS[name](y) ** 2).sum(), y)
    expected = set(gradient.abs().sum((0, 1)).nonzero().flatten().tolist())
    assert found_by(WAYS[name]) == {False: expected, True: set()}


@pytest.mark.parametrize(
    ("name", "gate"),
    [("the first half", range(6)), ("the second", range(6, 12)), ("glu", range(6, 12))],
)
def test_the_gate_is_what_was_activated(name: str, gate: range) -> None:
    assert found_by(GATED[name]) == {True: set(gate), False: set(range(ROWS)) - set(gate)}


def test_what_mixes_rows_is_opaque_and_a_statistic_is_no_row() -> None:
    assert found_by(lambda y: y.mean(-1, True)) == {False: set(), True: set()}
    with pytest.raises(OpaqueError):
        found_by(lambda y: y.flatten().max())


@pytest.mark.parametrize("period", [1, 4, 6])
def test_the_slice_of_a_slice_s_rows_is_found_again(period: int) -> None:
    for start, end, groups in product(range(period), range(1, period + 1), (1, 2, 3)):
        if start < end:
            part = Slice(start, end - start, period, groups)
            rows = [row for row in range(period * groups) if start <= row % period < end]
            found = as_slice(rows, part.whole)
            assert found is not None
            assert found.indices() == rows == part.indices()


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 23)))
def test_rows_become_a_slice_of_exactly_these_rows_or_none(rows: set[int]) -> None:
    found = as_slice(rows, 24)
    assert found is None or (found.indices() == sorted(rows) and found.whole == 24)


def test_rows_without_a_period_are_no_slice() -> None:
    assert as_slice([0, 1, 4, 5, 9], 12) is None
    assert as_slice([], 12) is None
