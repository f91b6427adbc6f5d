"""MXFP4: floats of four bits with a power of two for each 32 of them, as GPT-OSS keeps its experts.

    blocks (..., out, in / 32, 16), two numbers a byte, the first in the low bits;
    scales (..., out, in / 32), bytes: W[..., i, o] = table[q[..., o, i]] * 2 ** (scale - 127)

The weight is the transpose, (..., in, out), as the model multiplies with it. Open Compute Project,
"OCP Microscaling Formats (MX) Specification", 1.0, 2023, sections 5.3 and 6.3: the scale of a block
is the largest power of two in its largest value, over the one in the largest float, which is 4.
"""

from __future__ import annotations

import numpy as np

from peftsurgery.checkpoint.arrays import Array
from peftsurgery.checkpoint.codecs.bands import Bands, PartCut
from peftsurgery.checkpoint.codecs.codec import Codec, Parts, Said

BLOCK, BIAS, LARGEST_POWER = 32, 127, 2
HALF = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
TABLE = np.concatenate([HALF, -HALF])
MIDDLES = (HALF[1:] + HALF[:-1]) / 2
# A value in the middle goes to the number whose last bit is zero: past the odd ones' middles.
TO_EVEN = np.where(np.arange(len(MIDDLES)) % 2, MIDDLES, np.nextafter(MIDDLES, np.float32(9)))


def floats(packed: Array) -> Array:
    """The floats in bytes, two in each, along the last axis: the first in the low bits."""
    found = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.float32)
    found[..., ::2], found[..., 1::2] = TABLE[packed & 15], TABLE[packed >> 4]
    return found


def nearest_numbers(values: Array) -> Array:
    """The numbers of the floats of four bits that are nearest to values."""
    numbers = np.searchsorted(TO_EVEN, np.abs(values)).astype(np.uint8)
    numbers |= np.signbit(values).astype(np.uint8) << 3
    return numbers


def in_bytes(numbers: Array) -> Array:
    """Numbers of floats in bytes: what :func:`floats` reads."""
    packed: Array = numbers[..., ::2] | numbers[..., 1::2] << 4
    return packed


def _decode(parts: Parts, said: Said) -> Array:
    packed, scales = parts["weight"], parts["scale"].astype(np.int32) - BIAS
    numbers = floats(packed)
    np.ldexp(numbers, scales[..., None], out=numbers)
    return np.swapaxes(numbers.reshape(*packed.shape[:-2], -1), -1, -2)


def _encode(values: Array, parts: Parts, said: Said) -> dict[str, Array]:
    blocks = np.swapaxes(values, -1, -2).reshape(*parts["scale"].shape, BLOCK)
    largest = np.abs(blocks).max(-1)
    power = np.frexp(largest)[1] - 1 - LARGEST_POWER
    scale = np.clip(np.where(largest > 0, power + BIAS, parts["scale"]), 0, 254).astype(np.uint8)
    scaled = np.ldexp(blocks, BIAS - scale[..., None].astype(np.int32))
    return {"weight": in_bytes(nearest_numbers(scaled)), "scale": scale}


def _shape(parts: Parts, said: Said) -> tuple[int, ...]:
    *stack, out, blocks, _ = parts["weight"].shape
    return (*stack, blocks * BLOCK, out)


def _bands(parts: Parts, said: Said) -> Bands | None:
    """One expert after the other: the rows of a matrix lie across its parts."""
    is_stack = parts["weight"].ndim == 4
    return Bands(1, {"weight": PartCut(), "scale": PartCut()}) if is_stack else None


MXFP4 = Codec(
    "mxfp4",
    {"weight": "_blocks", "scale": "_scales"},
    _shape,
    _decode,
    _encode,
    plain="",
    bands=_bands,
)
