"""Rounding of a block of a fold to the dtype that is written, and what is measured of it there.

Most blocks take one pass of ``rounding.c``, which is compiled when this package is built. Where
there was no compiler, and in fp64, numpy takes some fifteen passes to the same bytes, counts and
extremes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from ctypes import CDLL, POINTER, Structure, c_double, c_float, c_int, c_int32, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from peftsurgery.checkpoint.arrays import FLOATS, Array

LIBRARY = Path(__file__).with_name("librounding.so")  # as tools/compile.py calls it
LINE = 64  # bytes of a line of the processor's cache


def is_compiled() -> bool:
    """Whether ``rounding.c`` was compiled for this machine."""
    return _compiled() is not None


class BlockMeasures(NamedTuple):
    """What is measured of a block: sums of squares, counts, extremes.

    ``moved`` counts the numbers that are not what they were; ``change`` and ``base`` are sums of
    squares, of the changes and of what was there; ``largest`` is the largest change in units of
    the last place (ulp) of the dtype that is written, ``rounding`` the largest rounding error.
    ``is_finite`` may be false for numbers that are, where a square is not.
    """

    moved: int
    change: float
    base: float
    largest: float
    rounding: float
    is_finite: bool


class Rounding:
    """Rounding of blocks, one after the other, by ``rounding.c`` where it was compiled."""

    def __init__(self) -> None:
        self._room: Array | None = None

    def rounded(self, before: Array, exact: Array, dtype: str) -> tuple[Array, BlockMeasures]:
        """A block's numbers in ``dtype``, and what is measured: it was ``before`` and is ``exact``.

        Both are in the dtype of the sum, fp32 or fp64.
        """
        compiled = _compiled()
        if compiled is not None and dtype in _COMPILED and exact.dtype == np.float32:
            return compiled(before, exact, dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            stored = exact.astype(FLOATS[dtype])
            return stored, self.measured(before, exact, stored.astype(exact.dtype), dtype)

    def measured(self, before: Array, exact: Array, written: Array, dtype: str) -> BlockMeasures:
        """What is measured of a block that is ``written`` in whatever way; that is overwritten.

        The less memory this takes, the more of it is in the cache.
        """
        if not exact.size:
            return BlockMeasures(0, 0.0, 0.0, 0.0, 0.0, True)
        before, exact, written = np.atleast_1d(before, exact, written)
        room = self._room_for(exact)
        power = power_below(before, exact, dtype, room)
        gap = np.subtract(exact, before, out=room[1])
        moved = int(np.count_nonzero(written != before))
        change, base = float(np.vdot(gap, gap)), float(np.vdot(before, before))
        largest = most_ulps(gap, power, dtype)
        rounding = farthest(np.subtract(written, exact, out=written))
        # A sum of squares or a maximum that is finite tells that of everything in it.
        is_finite = math.isfinite(base) and math.isfinite(rounding)
        return BlockMeasures(moved, change, base, largest, rounding, is_finite)

    def _room_for(self, block: Array) -> Array:
        """Two arrays like a block, the same for all blocks of one shape.

        The system would have to make memory ready for new ones each time.
        """
        shape = (2, *block.shape)
        if self._room is None or (self._room.shape, self._room.dtype) != (shape, block.dtype):
            self._room = lined_up(shape, block.dtype)
        return self._room


class _Measures(Structure):
    """``struct measures`` of ``rounding.c``."""

    _fields_ = (
        ("moved", c_uint64),
        ("change", c_double),
        ("base", c_double),
        ("largest", c_float),
        ("rounding", c_float),
        ("is_finite", c_int32),
    )


# What ``rounding.c`` writes, and its numbers for that.
_COMPILED: Mapping[str, int] = MappingProxyType({"BF16": 0, "F16": 1, "F32": 2})


@cache
def _compiled() -> Callable[[Array, Array, str], tuple[Array, BlockMeasures]] | None:
    """What ``rounding.c`` does; None where it was not compiled for this machine."""
    try:
        function = CDLL(str(LIBRARY)).round_block
    except (OSError, AttributeError):  # none there, or another's
        return None
    function.argtypes = (c_void_p, c_void_p, c_void_p, c_uint64, c_int, POINTER(_Measures))
    function.restype = None

    def rounded(before: Array, exact: Array, dtype: str) -> tuple[Array, BlockMeasures]:
        before, exact = (np.asarray(each, np.float32, order="C") for each in (before, exact))
        stored, found = np.empty(exact.shape, FLOATS[dtype]), _Measures()
        places = (each.__array_interface__["data"][0] for each in (before, exact, stored))
        function(*places, exact.size, _COMPILED[dtype], found)
        steps = _bits(dtype, exact.dtype).steps
        return stored, BlockMeasures(
            found.moved,
            found.change,
            found.base,
            found.largest * steps,
            found.rounding,
            bool(found.is_finite),
        )

    return rounded


def lined_up(shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    """An array whose content is whatever there was, which begins with a line of the cache.

    numpy's own begin anywhere: what it writes to them then lies in two lines at a time, and sums
    and differences take twice as long.
    """
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + LINE, np.uint8)
    start = -room.ctypes.data % LINE
    return room[start : start + size].view(dtype).reshape(shape)


def farthest(values: Array) -> float:
    """How far the number that is farthest from 0 is from it; NaN if one of them is NaN."""
    return float(max(values.max(), -values.min()))


def ulp(one: Array, other: Array, dtype: str) -> Array:
    """Distance between neighbouring numbers of ``dtype`` at the larger of two values (fp32, fp64).

    The exponent of a number is in its bits, so this takes no logarithm.
    """
    place = power_below(one, other, dtype, np.empty((2, *one.shape), one.dtype))
    return np.multiply(place, 1 / _bits(dtype, one.dtype).steps, out=place)


def most_ulps(change: Array, power: Array, dtype: str) -> float:
    """The largest of some changes, up or down, each in the :func:`ulp` of its two values.

    ``power`` is what :func:`power_below` gives for these. The changes are overwritten.
    """
    parts = np.divide(change, power, out=change)
    return farthest(parts) * _bits(dtype, change.dtype).steps


class _Bits(NamedTuple):
    """What the numbers of two dtypes are made of, as whole numbers of the wide one's size.

    ``exponent`` masks the wide one's exponent, ``least`` is the least number that the other has
    with all digits, in bits of the wide one; ``steps`` are the other's numbers from 1 to 2.
    """

    whole: np.dtype[Any]
    exponent: Any
    least: Any
    steps: float


@cache
def _bits(dtype: str, wide: np.dtype[Any]) -> _Bits:
    info, narrow = np.finfo(wide), ml_dtypes.finfo(FLOATS[dtype])
    whole = np.dtype(f"i{wide.itemsize}")
    exponent = whole.type((1 << info.nexp) - 1) << whole.type(info.nmant)
    least = np.asarray(narrow.smallest_normal, wide).view(whole)[()]
    return _Bits(whole, exponent, least, 2.0**narrow.nmant)


def power_below(one: Array, other: Array, dtype: str, room: Array) -> Array:
    """The power of two at or below the larger of two values, in the first of two arrays.

    It is no less than the smallest that ``dtype`` has with all digits.
    """
    whole, exponent, least, _ = _bits(dtype, one.dtype)
    bits, others = (
        np.bitwise_and(value.view(whole), exponent, out=place.view(whole))
        for value, place in zip((one, other), room, strict=True)
    )
    np.maximum(bits, others, out=bits)
    if bits.size and bits.min() < least:  # rare, and slow
        np.maximum(bits, least, out=bits)
    power: Array = room[0]
    return power
