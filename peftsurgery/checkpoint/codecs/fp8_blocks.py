"""FP8 with a scale for each block of the weight, as DeepSeek-V3 is stored.

    weight (out, in) in e4m3, weight_scale_inv (out / 128, in / 128) in fp32:
    W[i, j] = weight[i, j] * weight_scale_inv[i // 128, j // 128]

A config without a block size has one scale for all of a weight, and may have one for activations.

DeepSeek-AI, 2024, arXiv:2412.19437, section 3.3.2; the name of the scale is the reciprocal's. A
block that is quantised again may get the scale largest / 448; see :mod:`.nearest`.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from peftsurgery.checkpoint.arrays import Array
from peftsurgery.checkpoint.codecs.codec import Codec, Parts, Said
from peftsurgery.checkpoint.codecs.nearest import inverse, nearer_scales

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
TINY = np.finfo(np.float32).tiny
LARGEST = 448


def _decode(parts: Parts, said: Said) -> Array:
    weight, scale = parts["weight"], _table(parts).astype(np.float32)
    rows, columns = _block(parts, said)
    out, in_ = weight.shape
    spread = np.repeat(np.repeat(scale, rows, axis=0)[:out], columns, axis=1)[:, :in_]
    return weight.astype(np.float32) * spread


def _encode(values: Array, parts: Parts, said: Said) -> dict[str, Array]:
    rows, columns = _block(parts, said)
    table = _table(parts)
    scales, weight = table.copy(), np.empty(values.shape, E4M3)
    for row, kept in enumerate(table):
        part = slice(rows * row, rows * (row + 1))
        strip = np.pad(values[part], ((0, 0), (0, -values.shape[1] % columns)))
        blocks = strip.reshape(len(strip), -1, columns).swapaxes(0, 1).reshape(len(kept), -1)
        fresh = _stored_scale(np.abs(blocks).max(1) / LARGEST, kept.dtype)
        scales[row] = nearer_scales(blocks, kept, fresh, lambda x: _stored(x).astype(np.float32))
        spread = np.repeat(inverse(scales[row].astype(np.float32)), columns)[: values.shape[1]]
        weight[part] = _stored(values[part] * spread)
    return {"weight": weight, "scale": scales.reshape(parts["scale"].shape)}


def _stored(values: Array) -> Array:
    return np.clip(values, -LARGEST, LARGEST).astype(E4M3)


def _stored_scale(scale: Array, dtype: np.dtype[Any]) -> Array:
    """Scales in the dtype that they are kept in; a power of two is the next larger one."""
    if dtype == ml_dtypes.float8_e8m0fnu:
        scale = np.exp2(np.ceil(np.log2(np.maximum(scale, TINY))))
    return scale.astype(dtype)


def _table(parts: Parts) -> Array:
    """The scales by rows and columns of blocks."""
    scale = parts["scale"]
    return scale.reshape(1, 1) if scale.size == 1 else scale


def _block(parts: Parts, said: Said) -> tuple[int, int]:
    whole = parts["weight"].shape if parts["scale"].size == 1 else (128, 128)
    rows, columns = said.get("weight_block_size") or whole
    return rows, columns


FP8_BLOCKS = Codec(
    "fp8",
    {"weight": ".weight", "activations": ".activation_scale", "scale": ".weight_scale_inv"},
    lambda parts, said: (parts["weight"].shape[0], parts["weight"].shape[1]),
    _decode,
    _encode,
    optional=("activations",),
)
