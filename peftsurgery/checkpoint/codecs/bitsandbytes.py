"""bitsandbytes: four bits with a table and a largest value for each block, and eight bits by rows.

    four bits: W.flat[k] = table[q[k]] * absmax[k // blocksize], two numbers a byte, the first in
    the high bits; with double quantisation absmax is itself a byte in another table:
    absmax[b] = nested_table[a[b]] * nested_absmax[b // nested_blocksize] + offset
    eight bits: W[i, j] = weight[i, j] * SCB[i] / 127

Dettmers et al., 2023, arXiv:2305.14314, section 3; Dettmers et al., 2022, arXiv:2208.07339. The
tables, block sizes and the shape are in the file (`quant_state`, a JSON text).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from peftsurgery.checkpoint.arrays import Array
from peftsurgery.checkpoint.codecs.codec import Codec, Parts, Said


def state_of(parts: Parts) -> dict[str, Any]:
    """What the file says of a weight in four bits."""
    found: dict[str, Any] = json.loads(parts["state"].tobytes())
    return found


def _four_bits(parts: Parts, said: Said) -> Array:
    state, table = state_of(parts), parts["table"].astype(np.float32)
    absmax = parts["absmax"]
    if "nested_absmax" in parts:
        block = state["nested_blocksize"]
        outer = np.repeat(parts["nested_absmax"].astype(np.float32), block)[: absmax.size]
        absmax = parts["nested_table"].astype(np.float32)[absmax.reshape(-1)] * outer
        absmax = absmax + np.float32(state["nested_offset"])
    packed = parts["weight"].reshape(-1)
    numbers = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    shape = state["shape"]
    values = table[numbers[: int(np.prod(shape))]]
    scale = np.repeat(absmax.astype(np.float32).reshape(-1), state["blocksize"])[: values.size]
    return np.multiply(values, scale, out=values).reshape(shape)


def _eight_bits(parts: Parts, said: Said) -> Array:
    scale = parts["scale"].astype(np.float32)[:, None] / np.float32(127)
    return parts["weight"].astype(np.float32) * scale


def _shape(parts: Parts, said: Said) -> tuple[int, int]:
    rows, columns = state_of(parts)["shape"]
    return rows, columns


def _four(kind: str) -> Codec:
    return Codec(
        f"bitsandbytes {kind}",
        {
            "weight": "weight",
            "absmax": "weight.absmax",
            "table": "weight.quant_map",
            "nested_absmax": "weight.nested_absmax",
            "nested_table": "weight.nested_quant_map",
            "state": f"weight.quant_state.bitsandbytes__{kind}",
        },
        _shape,
        _four_bits,
        optional=("nested_absmax", "nested_table"),
        small=("state",),
    )


NF4, FP4 = _four("nf4"), _four("fp4")
INT8 = Codec(
    "bitsandbytes int8",
    {"weight": "weight", "scale": "SCB", "format": "weight_format"},
    lambda parts, said: (parts["weight"].shape[0], parts["weight"].shape[1]),
    _eight_bits,
    optional=("format",),
)
