"""GPTQ and AWQ: whole numbers of a few bits in words of 32, with a scale and a zero for each group.

    W[o, i] = scales[g, o] * (q[i, o] - zeros[g, o]),  g the group of input i

GPTQ (Frantar et al., 2022, arXiv:2210.17323, as AutoGPTQ stores it) packs q along the inputs, the
lowest bits first, and names the group of each input in g_idx; its zeros are one less than they
mean, but in the format "gptq_v2". AWQ (Lin et al., 2023, arXiv:2306.00978, version "gemm") packs
along the outputs, of each eight those at 0, 2, 4, 6, 1, 3, 5, 7 in this order.
"""

from __future__ import annotations

import numpy as np

from peftsurgery.checkpoint.arrays import Array
from peftsurgery.checkpoint.codecs.codec import Codec, Parts, Said

WORD = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpacked(words: Array, bits: int) -> Array:
    """The numbers in words (rows, words), as (rows, words * 32 / bits): the lowest bits first."""
    shifts = np.arange(0, WORD, bits, dtype=np.uint32)
    numbers = (words.view(np.uint32)[:, :, None] >> shifts) & np.uint32(2**bits - 1)
    return numbers.astype(np.int32).reshape(len(words), -1)


def _gptq(parts: Parts, said: Said) -> Array:
    bits = said["bits"]
    numbers = unpacked(np.ascontiguousarray(parts["weight"].T), bits)  # (out, in)
    zeros = unpacked(parts["zeros"], bits) + (said.get("checkpoint_format") != "gptq_v2")
    groups, inputs = len(parts["scales"]), numbers.shape[1]
    order = parts.get("groups")
    order = np.arange(inputs) * groups // inputs if order is None else order
    scales = parts["scales"].astype(np.float32)
    return _scaled(numbers, zeros, scales, order)


def _awq(parts: Parts, said: Said) -> Array:
    numbers, zeros = (_reordered(unpacked(parts[name], 4)) for name in ("weight", "zeros"))
    scales = parts["scales"].astype(np.float32)
    order = np.arange(len(numbers)) * len(scales) // len(numbers)
    return _scaled(np.ascontiguousarray(numbers.T), zeros, scales, order)


def _reordered(numbers: Array) -> Array:
    """Numbers (rows, columns) as AWQ packs them, in the order of their columns."""
    eights = numbers.reshape(len(numbers), -1, len(AWQ_ORDER))
    result = np.empty_like(eights)
    result[:, :, AWQ_ORDER] = eights
    return result.reshape(numbers.shape)


def _scaled(numbers: Array, zeros: Array, scales: Array, order: Array) -> Array:
    """The weight (out, in) of numbers (out, in); zeros and scales are (groups, out)."""
    shifted = (numbers - zeros.T[:, order]).astype(np.float32)
    return np.multiply(shifted, scales.T[:, order], out=shifted)


def _refuses_gptq(said: Said) -> str | None:
    return None if said.get("bits") in (2, 4, 8) else f"GPTQ in {said.get('bits')} bits"


def _refuses_awq(said: Said) -> str | None:
    version = str(said.get("version", "gemm")).lower()
    if said.get("bits", said.get("w_bit", 4)) != 4 or version != "gemm":
        return f"AWQ in {said.get('bits')} bits, version {version}"
    return None


PARTS = {"weight": "qweight", "zeros": "qzeros", "scales": "scales"}
GPTQ = Codec(
    "gptq",
    {**PARTS, "groups": "g_idx"},
    lambda parts, said: (parts["weight"].shape[1], parts["weight"].shape[0] * WORD // said["bits"]),
    _gptq,
    _refuses_gptq,
    ("groups",),
)
AWQ = Codec(
    "awq",
    PARTS,
    lambda parts, said: (parts["weight"].shape[1] * WORD // 4, parts["weight"].shape[0]),
    _awq,
    _refuses_awq,
)
