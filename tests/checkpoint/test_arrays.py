"""Units in the last place, against what numpy and exact arithmetic say of them."""

import ml_dtypes
import numpy as np
import pytest

from peftsurgery.checkpoint.arrays import (
    FLOATS,
    LINE,
    farthest,
    lined_up,
    most_ulps,
    power_below,
    ulp,
)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("wide", [np.float32, np.float64])
def test_an_ulp_is_the_distance_to_the_next_number(dtype: str, wide: type) -> None:
    info = ml_dtypes.finfo(FLOATS[dtype])
    values = np.array([1, 1.5, 2, 3.99, 1e-3, 6e4, 65504, -7, 0, 1e-30, -1e-30], wide)
    _, exponents = np.frexp(np.maximum(np.abs(values), wide(info.smallest_normal)))
    wanted = np.ldexp(wide(1), exponents - 1 - info.nmant)
    assert np.array_equal(ulp(values, np.zeros_like(values), dtype), wanted)
    assert np.array_equal(ulp(np.zeros_like(values), values, dtype), wanted)


def test_an_ulp_of_fp32_is_numpys_spacing() -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert np.array_equal(ulp(values, values, "F32"), np.spacing(np.abs(values)))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_most_ulps_are_of_the_change_up_or_down_that_has_most(dtype: str) -> None:
    draw = np.random.default_rng(0)
    for sign in (1, -1):
        one, change = draw.standard_normal((2, 5, 7)).astype(np.float32)
        change[2, 3] = sign * 40
        other = one + change
        wanted = np.max(np.abs(change) / ulp(one, other, dtype))
        room = np.empty((2, 5, 7), np.float32)
        power = power_below(one, other, dtype, room)
        assert most_ulps(change.copy(), power, dtype) == wanted


def test_the_farthest_number_is_the_one_of_the_largest_magnitude() -> None:
    assert farthest(np.array([1.0, -3.0, 2.0])) == 3
    assert farthest(np.array([1.0, -3.0, np.inf])) == np.inf
    assert np.isnan(farthest(np.array([1.0, np.nan, 5.0])))


@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), ()])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_array_begins_with_a_line_of_the_cache(shape: tuple[int, ...], dtype: type) -> None:
    for _ in range(5):
        made = lined_up(shape, np.dtype(dtype))
        assert (made.shape, made.dtype, made.ctypes.data % LINE) == (shape, dtype, 0)
        assert made.flags.c_contiguous
        assert made.flags.writeable
