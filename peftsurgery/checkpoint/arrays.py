"""Numbers of safetensors files as numpy arrays: read, widened for arithmetic, rounded once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from peftsurgery.checkpoint.tensor_file import Tensor, TensorFile

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


def wide_dtype(dtype: str) -> np.dtype[Any]:
    """The dtype in which changes of a weight are added: fp64 for one in fp64, else fp32."""
    return np.dtype(np.float64 if dtype == "F64" else np.float32)


def read_rows(file: TensorFile, tensor: Tensor, start: int = 0, end: int | None = None) -> Array:
    """Rows ``start`` to ``end`` of a tensor (along its first axis; all of a scalar), as stored."""
    dtype, rows = FLOATS[tensor.dtype], tensor.shape[0] if tensor.shape else 1
    end = rows if end is None else end
    width = tensor.size // max(rows, 1)
    content = read_bytes(file, tensor, start * width, (end - start) * width)
    shape = (end - start, *tensor.shape[1:]) if tensor.shape else ()
    return np.frombuffer(content, dtype).reshape(shape)


def read_bytes(file: TensorFile, tensor: Tensor, start: int, size: int) -> bytearray:
    """Bytes of a tensor, from its byte ``start`` on. Raises EOFError if the file has shrunk."""
    content = bytearray(size)
    with file.path.open("rb", buffering=0) as stream:
        done, place = 0, file.offset + tensor.start + start
        while done < size:
            got = os.preadv(stream.fileno(), [memoryview(content)[done:]], place + done)
            if not got:
                raise EOFError(f"{file.path} has become shorter")
            done += got
    return content


def ulp(values: Array, dtype: str) -> Array:
    """Distance from the absolute of each value (fp32 or fp64) to the next number of ``dtype``."""
    info = ml_dtypes.finfo(FLOATS[dtype])
    _, exponents = np.frexp(np.maximum(np.abs(values), values.dtype.type(info.smallest_normal)))
    return np.ldexp(values.dtype.type(1.0), exponents - 1 - info.nmant)
