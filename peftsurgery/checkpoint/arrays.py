"""Numbers of safetensors files as numpy arrays: read, widened for arithmetic, rounded once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from io import FileIO
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from peftsurgery.checkpoint.tensor_bytes import fill, read_into
from peftsurgery.tensor_file import Tensor, TensorFile

Array = npt.NDArray[Any]

LINE = 64  # bytes of a line of the processor's cache

# What can be computed with, by the format's names; other tensors are copied as bytes.
FLOATS: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "F64": np.dtype(np.float64),
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
    }
)

# What codecs read besides: whole numbers, and floats of eight bits.
NUMBERS: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        **FLOATS,
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
        **{f"I{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
        **{f"U{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    }
)


def wide_dtype(dtype: str) -> np.dtype[Any]:
    """The dtype in which changes of a weight are added: fp64 for one in fp64, else fp32."""
    return np.dtype(np.float64 if dtype == "F64" else np.float32)


def read_rows(file: TensorFile, tensor: Tensor, start: int = 0, end: int | None = None) -> Array:
    """Rows ``start`` to ``end`` of a tensor (along its first axis; all of a scalar), as stored."""
    dtype, rows = NUMBERS[tensor.dtype], tensor.shape[0] if tensor.shape else 1
    end = rows if end is None else end
    width = tensor.size // max(rows, 1)
    shape = (end - start, *tensor.shape[1:]) if tensor.shape else ()
    found = np.empty(shape, dtype)
    read_into(as_bytes(found), file, tensor, start * width)
    return found


def read_columns(file: TensorFile, tensor: Tensor, start: int, end: int) -> Array:
    """Columns ``start`` to ``end`` of a matrix in a file that is here, as stored."""
    rows, columns = tensor.shape
    found = np.empty((rows, end - start), NUMBERS[tensor.dtype])
    room, width = as_bytes(found), found.itemsize * columns
    each, place = (
        found.itemsize * (end - start),
        file.offset + tensor.start + found.itemsize * start,
    )
    with FileIO(file.path) as stream:
        for row in range(rows):
            fill(stream, room[row * each : (row + 1) * each], place + row * width)
    return found


def as_bytes(value: Array) -> memoryview:
    """The bytes of an array, as a file holds them."""
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


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
