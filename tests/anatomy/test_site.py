"""A slice takes and puts the rows that numpy's indexing does, on tensors, fakes and proxies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from peftsurgery.anatomy import Slice


@st.composite
def slices(draw: st.DrawFn) -> Slice:
    period = draw(st.integers(1, 9))
    start = draw(st.integers(0, period - 1))
    length = draw(st.integers(1, period - start))
    return Slice(start, length, period, draw(st.integers(1, 5)))


def rows_of(part: Slice) -> list[int]:
    """The rows by the definition, without the slice's own arithmetic."""
    whole = range(part.period * part.groups)
    return [r for r in whole if part.start <= r % part.period < part.start + part.length]


@settings(max_examples=200, deadline=None)
@given(slices(), st.sampled_from([0, 1, 2, -1, -2, -3]))
def test_take_picks_the_rows_numpy_picks(part: Slice, dim: int) -> None:
    shape = [2, 3, 4]
    shape[dim] = part.whole
    value = torch.randn(shape)
    expected = value.numpy().take(rows_of(part), axis=dim)
    assert (part.take(value, dim).numpy() == expected).all()


@settings(max_examples=200, deadline=None)
@given(slices(), st.sampled_from([0, 1, 2, -1, -2, -3]))
def test_put_replaces_the_rows_and_no_others(part: Slice, dim: int) -> None:
    shape = [2, 3, 4]
    shape[dim] = part.whole
    value = torch.randn(shape)
    shape[dim] = part.rows
    new = torch.randn(shape)
    before = value.clone()
    expected = value.numpy().copy()
    np.moveaxis(expected, dim, 0)[rows_of(part)] = np.moveaxis(new.numpy(), dim, 0)
    assert (part.put(value, dim, new).numpy() == expected).all()
    assert value.equal(before)


@pytest.mark.parametrize(("start", "length", "period"), [(3, 2, 4), (-1, 1, 4), (0, 0, 4)])
def test_a_slice_outside_of_its_period_is_refused(start: int, length: int, period: int) -> None:
    with pytest.raises(ValueError, match="period"):
        Slice(start, length, period)


@pytest.mark.parametrize("part", [Slice(2, 3, 8), Slice(1, 2, 4, 3), Slice(0, 4, 4, 3)])
def test_a_graph_cuts_as_a_tensor_does(part: Slice) -> None:
    class Cut(torch.nn.Module):
        def forward(self, value: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
            return part.take(value, -1), part.put(value, -1, new)

    value, new = torch.randn(2, part.whole), torch.randn(2, part.rows)
    traced = fx.symbolic_trace(Cut())
    assert all(node.op != "call_method" for node in traced.graph.nodes)
    for cut, expected in zip(traced(value, new), Cut()(value, new), strict=True):
        assert cut.equal(expected)


def test_a_fake_tensor_is_cut_to_shape() -> None:
    part = Slice(1, 2, 4, 3)
    with FakeTensorMode():
        assert part.take(torch.empty(5, 12), 1).shape == (5, 6)
        assert part.put(torch.empty(5, 12), 1, torch.empty(5, 6)).shape == (5, 12)
