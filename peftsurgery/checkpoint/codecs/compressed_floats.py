"""Floats of compressed-tensors: FP8 with scales of any blocks, and NVFP4.

    FP8: weight (out, in) in e4m3, weight_scale by tensor, row ("channel"), group of inputs or block
    of rows and inputs:  W[o, i] = weight[o, i] * weight_scale[block of o, block of i]
    NVFP4: weight_packed (out, in / 2), two numbers a byte, the first in the low bits, weight_scale
    (out, in / 16) in e4m3, weight_global_scale of all:
    W[o, i] = table[q[o, i]] * (weight_scale[o, i / 16] / weight_global_scale)

compressed-tensors 0.20, `compressors/naive_quantized/base.py`, `compressors/nvfp4/base.py`. What is
quantised again may get the scale largest / 448 or largest / 6, and keeps the global scale, which
layers share that a program joins; see :mod:`.nearest`.
"""

from __future__ import annotations

import numpy as np

from peftsurgery.checkpoint.arrays import FLOATS as SCALES
from peftsurgery.checkpoint.arrays import Array
from peftsurgery.checkpoint.codecs.bands import Bands
from peftsurgery.checkpoint.codecs.codec import Codec, Parts, Said
from peftsurgery.checkpoint.codecs.fp8_blocks import (
    E4M3,
    LARGEST,
    spread_out,
    stored_in_blocks,
)
from peftsurgery.checkpoint.codecs.mxfp4 import HALF, TABLE, floats, in_bytes, nearest_numbers
from peftsurgery.checkpoint.codecs.nearest import inverse, nearer_scales
from peftsurgery.checkpoint.codecs.schemes import (
    ACTIVATIONS,
    FLOATS,
    NVFP4,
    PLAIN,
    bands_of,
    caches,
    checked_scales,
    has_parts,
    own_scheme,
    refused,
    scheme_reader,
)


def _eight_shape(parts: Parts, said: Said) -> tuple[int, int]:
    """The shape of the weight, once its scales are seen to be a table for it. ValueError."""
    has_parts(parts, weight=(E4M3,), scale=SCALES.values())
    rows, columns = parts["weight"].shape
    checked_scales(parts["scale"], own_scheme(said).table((rows, columns)))
    return rows, columns


def _eight(parts: Parts, said: Said) -> Array:
    if "zeros" in parts and parts["zeros"].astype(np.float32).any():
        raise ValueError("weight_zero_point is not 0")
    weight, scheme = parts["weight"], own_scheme(said)
    table = parts["scale"].reshape(scheme.table(weight.shape))
    return spread_out(weight, table, scheme.blocks(weight.shape))


def _pack_eight(values: Array, parts: Parts, said: Said) -> dict[str, Array]:
    scheme, scale = own_scheme(said), parts["scale"]
    table = scale.reshape(scheme.table(values.shape))
    weight, scales = stored_in_blocks(values, table, scheme.blocks(values.shape))
    return {"weight": weight, "scale": scales.reshape(scale.shape)}


def _four_shape(parts: Parts, said: Said) -> tuple[int, int]:
    """The shape of the weight, once its scales are seen to be a table for it. ValueError."""
    has_parts(parts, weight=(np.dtype(np.uint8),), scale=(E4M3,), whole=SCALES.values())
    rows, packed = parts["weight"].shape
    table = own_scheme(said).table((rows, 2 * packed))
    if parts["scale"].shape != table:
        raise ValueError(f"weight_scale is {list(parts['scale'].shape)}, not {list(table)}")
    whole = parts["whole"].astype(np.float32)
    if whole.size != 1 or not np.isfinite(whole).all() or not (whole > 0).all():
        raise ValueError("weight_global_scale is no number above 0")
    return rows, 2 * packed


def _whole(parts: Parts) -> Array:
    """The scale of all, by which those of groups are divided."""
    return parts["whole"].astype(np.float32).reshape(1, 1)


def _four(parts: Parts, said: Said) -> Array:
    numbers, scales = floats(parts["weight"]), parts["scale"].astype(np.float32) / _whole(parts)
    grouped = numbers.reshape(*scales.shape, -1)
    return np.multiply(grouped, scales[..., None], out=grouped).reshape(numbers.shape)


def _pack_four(values: Array, parts: Parts, said: Said) -> dict[str, Array]:
    whole, kept = _whole(parts), parts["scale"]
    blocks = values.reshape(kept.size, -1)
    largest = np.abs(blocks).max(1).reshape(kept.shape) / HALF[-1]
    fresh = np.clip(largest * whole, 0, LARGEST).astype(E4M3)
    mine, other = ((each.astype(np.float32) / whole).reshape(-1) for each in (kept, fresh))
    nearer = nearer_scales(blocks, mine, other, lambda x: TABLE[nearest_numbers(x)])
    scale = np.where(nearer.reshape(kept.shape) == mine.reshape(kept.shape), kept, fresh)
    numbers = nearest_numbers(blocks * inverse(nearer)[:, None])
    return {"weight": in_bytes(numbers.reshape(values.shape)), "scale": scale}


def _bands(parts: Parts, said: Said) -> Bands:
    return bands_of(own_scheme(said), parts["weight"].shape)


OPTIONAL = {"zeros": ".weight_zero_point", **ACTIVATIONS}
FLOAT8 = Codec(
    "compressed-tensors fp8",
    {"weight": ".weight", "scale": ".weight_scale", **OPTIONAL},
    _eight_shape,
    _eight,
    _pack_eight,
    refused,
    tuple(OPTIONAL),
    bands=_bands,
    scheme=scheme_reader(PLAIN, FLOATS),
    aside=caches,
)
FLOAT4 = Codec(
    "compressed-tensors nvfp4",
    {
        "weight": ".weight_packed",
        "scale": ".weight_scale",
        "whole": ".weight_global_scale",
        **ACTIVATIONS,
    },
    _four_shape,
    _four,
    _pack_four,
    refused,
    tuple(ACTIVATIONS),
    ("whole",),
    bands=_bands,
    scheme=scheme_reader((NVFP4,), FLOATS),
    aside=caches,
)
