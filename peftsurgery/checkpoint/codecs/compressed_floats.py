"""Floats of compressed-tensors: FP8 with scales of any blocks, NVFP4 and MXFP4.

    FP8: weight (out, in) in e4m3, weight_scale by tensor, row ("channel"), group of inputs or block
    of rows and inputs:  W[o, i] = weight[o, i] * weight_scale[block of o, block of i]
    NVFP4: weight_packed (out, in / 2), two numbers a byte, the first in the low bits, weight_scale
    (out, in / 16) in e4m3, weight_global_scale of all:
    W[o, i] = table[q[o, i]] * (weight_scale[o, i / 16] / weight_global_scale)
    MXFP4: the same with weight_scale (out, in / 32) in bytes:
    W[o, i] = table[q[o, i]] * 2 ** (weight_scale[o, i / 32] - 127)

compressed-tensors 0.20, `compressors/naive_quantized/base.py`, `compressors/nvfp4/base.py`,
`compressors/mxfp4/base.py`. What is quantised again may get the scale largest / 448 or largest / 6;
of MXFP4 the power of two in the largest value over 4, where that is rounded up from 7/8 of the next
one on (`quantization/utils/mxfp_utils.py`). The global scale stays, which layers share that a
program joins. See :mod:`.nearest`.
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
from peftsurgery.checkpoint.codecs.mxfp4 import (
    BIAS,
    HALF,
    LARGEST_POWER,
    TABLE,
    floats,
    in_bytes,
    nearest_numbers,
)
from peftsurgery.checkpoint.codecs.nearest import inverse, nearer_scales
from peftsurgery.checkpoint.codecs.schemes import (
    ACTIVATIONS,
    FLOATS,
    MXFP4,
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

BYTES = np.dtype(np.uint8)
NEAR_NEXT = 7 / 8


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
    dtype = E4M3 if "whole" in parts else BYTES
    has_parts(parts, weight=(BYTES,), scale=(dtype,), whole=SCALES.values())
    rows, packed = parts["weight"].shape
    table = own_scheme(said).table((rows, 2 * packed))
    if parts["scale"].shape != table:
        raise ValueError(f"weight_scale is {list(parts['scale'].shape)}, not {list(table)}")
    whole = parts.get("whole", np.ones(1)).astype(np.float32)
    if whole.size != 1 or not np.isfinite(whole).all() or not (whole > 0).all():
        raise ValueError("weight_global_scale is no number above 0")
    return rows, 2 * packed


def _meant(scale: Array, parts: Parts) -> Array:
    """What scales of groups mean, in fp32: parts of that of all, or powers of two."""
    if "whole" in parts:
        return scale.astype(np.float32) / parts["whole"].astype(np.float32).reshape(1, 1)
    return np.ldexp(np.float32(1), scale.astype(np.int32) - BIAS)


def _fresh(largest: Array, parts: Parts) -> Array:
    """The scales of groups that hold their largest values."""
    if "whole" in parts:
        whole = parts["whole"].astype(np.float32).reshape(1, 1)
        return np.clip(largest / HALF[-1] * whole, 0, LARGEST).astype(E4M3)
    share, power = np.frexp(largest)
    power = power - 1 - LARGEST_POWER + (share >= NEAR_NEXT)
    return np.clip(power + BIAS, 0, 254).astype(BYTES)


def _four(parts: Parts, said: Said) -> Array:
    numbers, scales = floats(parts["weight"]), _meant(parts["scale"], parts)
    grouped = numbers.reshape(*scales.shape, -1)
    return np.multiply(grouped, scales[..., None], out=grouped).reshape(numbers.shape)


def _pack_four(values: Array, parts: Parts, said: Said) -> dict[str, Array]:
    kept = parts["scale"]
    blocks = values.reshape(kept.size, -1)
    fresh = _fresh(np.abs(blocks).max(1).reshape(kept.shape), parts)
    mine, other = (_meant(each, parts).reshape(-1) for each in (kept, fresh))
    nearer = nearer_scales(blocks, mine, other, lambda x: TABLE[nearest_numbers(x)])
    scale = np.where((nearer == mine).reshape(kept.shape), kept, fresh)
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
FOURS = {"weight": ".weight_packed", "scale": ".weight_scale"}
FLOAT4 = Codec(
    "compressed-tensors nvfp4",
    {**FOURS, "whole": ".weight_global_scale", **ACTIVATIONS},
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
FLOAT4_POWERS = Codec(
    "compressed-tensors mxfp4",
    {**FOURS, **ACTIVATIONS},
    _four_shape,
    _four,
    _pack_four,
    refused,
    tuple(ACTIVATIONS),
    bands=_bands,
    scheme=scheme_reader((MXFP4,), FLOATS),
    aside=caches,
)
