"""Numbers of safetensors files as numpy arrays: read, and widened for arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from io import FileIO
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from peftsurgery.checkpoint.tensor_bytes import fill, read_into
from peftsurgery.tensor_file import Tensor, TensorFile

Array = npt.NDArray[Any]

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
