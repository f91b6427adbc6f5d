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
from peftsurgery.checkpoint.codecs.bands import Bands, PartCut
from peftsurgery.checkpoint.codecs.codec import Codec, Parts, Said
from peftsurgery.checkpoint.codecs.nearest import inverse, nearer_scales

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
TINY = np.finfo(np.float32).tiny
LARGEST = 448
AT_ONCE = 2**17  # numbers whose scales are tried at once


def spread_out(weight: Array, table: Array, block: tuple[int, int]) -> Array:
    """The values of a weight (out, in) in e4m3, by a table of scales, one for each block of it."""
    (rows, columns), (out, in_) = block, weight.shape
    scale = table.astype(np.float32)
    spread = np.repeat(np.repeat(scale, rows, axis=0)[:out], columns, axis=1)[:, :in_]
    return weight.astype(np.float32) * spread


def stored_in_blocks(values: Array, table: Array, block: tuple[int, int]) -> tuple[Array, Array]:
    """A weight in e4m3 for values, and the scales of its blocks: those of ``table``, or new ones.

    What :func:`spread_out` undoes.
    """
    rows, columns = block
    scales, weight = table.copy(), np.empty(values.shape, E4M3)
    for row, kept in enumerate(table):
        strip = values[rows * row : rows * (row + 1)]
        step = max(1, AT_ONCE // (max(1, len(strip)) * columns))
        for first in range(0, len(kept), step):
            some, wide = (
                slice(first, first + step),
                slice(first * columns, (first + step) * columns),
            )
            scales[row, some] = _scales(strip[:, wide], kept[some], columns)
            spread = np.repeat(inverse(scales[row, some].astype(np.float32)), columns)
            mine = strip[:, wide]
            weight[rows * row : rows * (row + 1), wide] = _stored(mine * spread[: mine.shape[1]])
    return weight, scales


def _decode(parts: Parts, said: Said) -> Array:
    return spread_out(parts["weight"], _table(parts), _block(parts, said))


def _encode(values: Array, parts: Parts, said: Said) -> dict[str, Array]:
    weight, scales = stored_in_blocks(values, _table(parts), _block(parts, said))
    return {"weight": weight, "scale": scales.reshape(parts["scale"].shape)}


def _scales(strip: Array, kept: Array, columns: int) -> Array:
    """The scales of some blocks that lie beside each other."""
    strip = np.pad(strip, ((0, 0), (0, -strip.shape[1] % columns)))
    blocks = strip.reshape(len(strip), -1, columns).swapaxes(0, 1).reshape(len(kept), -1)
    fresh = _stored_scale(np.abs(blocks).max(1) / LARGEST, kept.dtype)
    return nearer_scales(blocks, kept, fresh, lambda x: _stored(x).astype(np.float32))


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


def _bands(parts: Parts, said: Said) -> Bands:
    if parts["scale"].size == 1:
        return Bands(1, {"weight": PartCut()}, is_closed=True)
    rows, _ = _block(parts, said)
    return Bands(rows, {"weight": PartCut(), "scale": PartCut(0, 1, rows)})


FP8_BLOCKS = Codec(
    "fp8",
    {"weight": ".weight", "activations": ".activation_scale", "scale": ".weight_scale_inv"},
    lambda parts, said: (parts["weight"].shape[0], parts["weight"].shape[1]),
    _decode,
    _encode,
    optional=("activations",),
    bands=_bands,
)
