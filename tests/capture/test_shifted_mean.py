"""A mean with a number added has the bits that torch's mean and sum give it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peftsurgery.capture.program import generate_forward
from peftsurgery.capture.shifted_mean import ShiftedMean, shift_means
from tests.capture.test_cleanup import exported, targets

SIZES = (1, 2, 3, 7, 64, 100, 333, 512, 576, 1376, 4096)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("number", [1e-6, 1e-5, 1e-12, 0.1, 1])
def test_bits_are_those_of_mean_and_sum(dtype: torch.dtype, number: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        value = torch.randn(5, 3, size, generator=generator).mul(3).square().to(dtype)
        value[0, 0, 0], value[0, 1, 0], value[1] = float("nan"), float("inf"), 0
        for dims, keepdim in (([-1], True), ([2], False), ([0, 2], True)):
            count = size if len(dims) == 1 else 5 * size
            made = ShiftedMean(dims, keepdim, count, number)(value)
            expected = torch.mean(value, dims, keepdim) + number
            assert made.dtype == expected.dtype
            assert torch.equal(made.nan_to_num(7), expected.nan_to_num(7)), size
            assert made.shape == expected.shape


def test_a_value_that_is_not_contiguous_has_them_too() -> None:
    value = torch.rand(4, 96, 5).transpose(1, 2)
    made = ShiftedMean([-1], True, 96, 1e-6)(value)
    assert torch.equal(made, value.mean(-1, keepdim=True) + 1e-6)


def used(given: Tensor, body: Any) -> bool:
    """Whether the pass takes a function's mean; what is computed stays the same."""
    flat = exported(body, given)
    shift_means(flat.graph)
    (made,) = generate_forward(flat.graph, "mean")(flat, given)
    assert torch.equal(made, body(given))
    return any(isinstance(target, ShiftedMean) for target in targets(flat))


x = torch.rand(2, 3, 8)


@pytest.mark.parametrize(
    ("body", "taken"),
    [
        (lambda v: torch.rsqrt(v.mean(-1, keepdim=True) + 1e-6), True),
        (lambda v: v.mean((0, 2)) + 2, True),
        (lambda v: v.mean(-1) + v[..., 0], False),
        (lambda v: v.mean(-1, dtype=torch.float64) + 1, False),
        (lambda v: torch.add(v.mean(-1), 1, alpha=2), False),
        (lambda v: (lambda mean: mean.sin() + (mean + 1))(v.mean(-1)), False),
        (lambda v: v.mean() + 1, False),
    ],
    ids=[
        *("a norm", "two axes", "not a number", "another dtype", "a number with a factor"),
        *("read twice", "over all axes"),
    ],
)
def test_a_mean_is_taken_if_a_number_is_added_and_nothing_else_reads_it(
    body: Any, taken: bool
) -> None:
    assert used(x, body) is taken
