"""Rounding and units in the last place, against casts of ml_dtypes and exact arithmetic."""

import shutil

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftsurgery.checkpoint import rounding
from peftsurgery.checkpoint.arrays import FLOATS, Array
from peftsurgery.checkpoint.rounding import (
    LINE,
    Rounding,
    farthest,
    lined_up,
    most_ulps,
    power_below,
    ulp,
)

WIDE = {"F64": np.float64}  # what the sum is in, if not fp32
DTYPES = ["BF16", "F16", "F32", "F64"]
# Numbers of every kind: 0, the least there are, those at which a dtype's digits or its numbers end.
EDGES = [
    *(0.0, 1e-45, 5.9e-39, 1.1754944e-38, 2.9e-8, 5.97e-8, 6.1e-5, 6.103515625e-05),
    *(1.0, 1.00390625, 1.01171875, 1.00048828125, 65504.0, 65519.0, 3.3e38, 3.3961775e38),
]
numbers = st.one_of(st.sampled_from(EDGES), st.floats(0, 2.0**127, width=32))
signed = st.builds(lambda size, sign: size * sign, numbers, st.sampled_from([1.0, -1.0]))


@pytest.fixture(params=["compiled", "numpy"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Rounding:
    """Rounding in both ways that there are: in C, and as where there was no compiler."""
    if request.param == "numpy":
        monkeypatch.setattr(rounding, "_compiled", lambda: None)
    elif shutil.which("cc"):
        assert rounding._compiled() is not None
    return Rounding()


def agrees(way: Rounding, before: Array, exact: Array, dtype: str) -> None:
    """Compare a block's rounding with casts, and its measures with fp64's."""
    stored, found = way.rounded(before, exact, dtype)
    with np.errstate(all="ignore"):
        wanted = exact.astype(FLOATS[dtype])
        back, was, now = (each.astype(np.float64) for each in (wanted, before, exact))
        assert stored.shape == exact.shape
        assert stored.tobytes() == wanted.tobytes()
        are_finite = bool(np.isfinite([back, was, now]).all())
        assert found.is_finite <= are_finite
        if not are_finite:
            return
        assert found.moved == np.count_nonzero(back != was)
        gap = (exact - before).astype(np.float64)  # in the dtype of the sum
        if np.abs(gap).max(initial=0) < 1e18 > np.abs(was).max(initial=0):  # squares in fp32
            assert found.is_finite
            assert found.change == pytest.approx(np.vdot(gap, gap), rel=1e-5, abs=1e-30)
            assert found.base == pytest.approx(np.vdot(was, was), rel=1e-5, abs=1e-30)
        assert found.rounding == np.abs(back - now).max(initial=0)
        ulps = np.abs(gap) / ulp(*np.atleast_1d(was, now), dtype)
        if np.isfinite(exact - before).all():
            assert found.largest == ulps.max(initial=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 4), (1,), (), (15,), (16,), (3, 11), (64, 129)])
@pytest.mark.parametrize("scale", [1e-38, 1e-7, 1e-4, 1.0, 3e4])
def test_a_block_is_rounded_once_and_measured(
    way: Rounding, dtype: str, shape: tuple[int, ...], scale: float
) -> None:
    draw, wide = np.random.default_rng(0), WIDE.get(dtype, np.float32)
    with np.errstate(over="ignore"):
        before = np.asarray(draw.standard_normal(shape) * scale, FLOATS[dtype]).astype(wide)
    change = draw.standard_normal(shape) * scale * 0.01 * (draw.random(shape) > 0.3)
    exact = np.asarray(before + np.asarray(change, wide))
    for _ in range(2):  # with the room of the block before
        agrees(way, before, exact, dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_numbers_at_the_ends_of_a_dtype(way: Rounding, dtype: str) -> None:
    @given(st.lists(st.tuples(signed, signed), min_size=1, max_size=40))
    def holds(pairs: list[tuple[float, float]]) -> None:
        before, exact = np.array(pairs, np.float32).T
        agrees(way, before, exact, dtype)

    holds()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_number_and_every_tie_of_two_bytes(way: Rounding, dtype: str) -> None:
    with np.errstate(invalid="ignore", over="ignore"):
        numbers = np.arange(2**16, dtype=np.uint16).view(FLOATS[dtype]).astype(np.float32)
        numbers = np.sort(numbers[np.isfinite(numbers)])
        ties = ((numbers[:-1].astype(np.float64) + numbers[1:]) / 2).astype(np.float32)
        near = [np.nextafter(ties, np.float32(sign)) for sign in (np.inf, -np.inf)]
    for values in (numbers, ties, *near):
        agrees(way, np.zeros_like(values), values, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 16, 36])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_told_wherever_it_is(
    way: Rounding, dtype: str, place: int, value: float
) -> None:
    fine = np.ones(37, WIDE.get(dtype, np.float32))
    broken = fine.copy()
    broken[place] = value
    assert way.rounded(fine, fine, dtype)[1].is_finite
    assert not way.rounded(broken, fine, dtype)[1].is_finite
    assert not way.rounded(fine, broken, dtype)[1].is_finite


def test_what_is_too_large_for_half_precision_is_told(way: Rounding) -> None:
    fine, large = np.ones(20, np.float32), np.full(20, 65520, np.float32)
    assert way.rounded(fine, large - 1, "F16")[1].is_finite
    assert not way.rounded(fine, large, "F16")[1].is_finite


def test_a_block_may_lie_turned_or_in_strides(way: Rounding) -> None:
    draw = np.random.default_rng(0)
    before, exact = draw.standard_normal((2, 24, 30)).astype(np.float32)
    agrees(way, before.T, exact.T, "BF16")
    agrees(way, before[::2, 3:], exact[::2, 3:], "BF16")


def test_a_sign_of_zero_is_kept_and_moves_nothing(way: Rounding) -> None:
    zero = np.zeros(5, np.float32)
    stored, found = way.rounded(zero, -zero, "BF16")
    assert np.signbit(stored.astype(np.float32)).all()
    assert found.moved == 0


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
