"""GPTQ and AWQ: whole numbers of a few bits in words of 32, with a scale and a zero for each group.

    W[o, i] = scales[g, o] * (q[i, o] - zeros[g, o]),  g the group of input i

GPTQ (Frantar et al., 2022, arXiv:2210.17323, as AutoGPTQ stores it) packs q along the inputs, the
lowest bits first, and names the group of each input in g_idx; its zeros are one less than they
mean, but in the format "gptq_v2". AWQ (Lin et al., 2023, arXiv:2306.00978, version "gemm") packs
along the outputs, of each eight those at 0, 2, 4, 6, 1, 3, 5, 7 in this order.

A group that is quantised again may get the scale and the zero that reach from its smallest value to
its largest, where that is nearer; see :mod:`.nearest`. Where all zeros are in the middle they stay
there: kernels for symmetric weights do not read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from peftsurgery.checkpoint.arrays import Array
from peftsurgery.checkpoint.codecs.bands import Bands, PartCut
from peftsurgery.checkpoint.codecs.codec import Codec, Parts, Said
from peftsurgery.checkpoint.codecs.nearest import inverse

WORD = 32
ROWS = 64  # of a band: what lies together in the files, since a row is a column there
AT_ONCE = 2**16  # elements of groups that are quantised at once: they stay in the cache
ALL_ZEROS = "all zeros"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

# From values of groups (groups, inputs, out), their zeros (groups, out), the dtype of scales and
# what zeros may be: zeros and scales.
Grid = Callable[[Array, Array, np.dtype[Any], range], tuple[Array, Array]]


def unpacked(words: Array, bits: int) -> Array:
    """The numbers in words (rows, words), as (rows, words * 32 / bits): the lowest bits first."""
    shifts = np.arange(0, WORD, bits, dtype=np.uint32)
    numbers = (words.view(np.uint32)[:, :, None] >> shifts) & np.uint32(2**bits - 1)
    return numbers.astype(np.int32).reshape(len(words), -1)


def packed(numbers: Array, bits: int) -> Array:
    """Numbers (rows, columns) in words: what :func:`unpacked` undoes."""
    each = numbers.astype(np.uint32).reshape(len(numbers), -1, WORD // bits)
    shifted = np.left_shift(each, np.arange(0, WORD, bits, dtype=np.uint32), out=each)
    return np.bitwise_or.reduce(shifted, axis=2).view(np.int32)


def _gptq(parts: Parts, said: Said) -> Array:
    numbers = unpacked(np.ascontiguousarray(parts["weight"].T), said["bits"])  # (out, in)
    zeros = unpacked(parts["zeros"], said["bits"]) + _less(said)
    scales = parts["scales"].astype(np.float32)
    return scaled(numbers, zeros, scales, _groups(parts, numbers.shape[1]))


def _pack_gptq(values: Array, parts: Parts, said: Said) -> dict[str, Array]:
    bits, less = said["bits"], _less(said)
    zeros, scales = unpacked(parts["zeros"], bits) + less, parts["scales"].copy()
    groups = _groups(parts, values.shape[1])
    laid_out = _grid(parts.get(ALL_ZEROS, parts["zeros"]), bits, less)
    numbers = requantised(values, zeros, scales, groups, range(less, 2**bits), laid_out)
    weight = np.ascontiguousarray(packed(numbers, bits).T)
    return {"weight": weight, "zeros": packed(zeros - less, bits), "scales": scales}


def _less(said: Said) -> int:
    """By how much zeros are less than they mean."""
    return int(said.get("checkpoint_format") != "gptq_v2")


def _groups(parts: Parts, inputs: int) -> Array:
    """The group of each input."""
    order, count = parts.get("groups"), len(parts["scales"])
    return evenly(inputs, count) if order is None else order


def evenly(inputs: int, count: int) -> Array:
    """The groups of inputs that follow one another."""
    return np.arange(inputs) * count // inputs


def _awq(parts: Parts, said: Said) -> Array:
    numbers, zeros = (_reordered(unpacked(parts[name], 4)) for name in ("weight", "zeros"))
    scales = parts["scales"].astype(np.float32)
    return scaled(np.ascontiguousarray(numbers.T), zeros, scales, _groups(parts, len(numbers)))


def _pack_awq(values: Array, parts: Parts, said: Said) -> dict[str, Array]:
    zeros, scales = _reordered(unpacked(parts["zeros"], 4)), parts["scales"].copy()
    laid_out = _grid(parts.get(ALL_ZEROS, parts["zeros"]), 4)
    groups = _groups(parts, values.shape[1])
    numbers = requantised(values, zeros, scales, groups, range(16), laid_out)
    made = {"weight": numbers.T, "zeros": zeros}
    words = {name: packed(_ordered(value), 4) for name, value in made.items()}
    return {**words, "scales": scales}


def _reordered(numbers: Array) -> Array:
    """Numbers (rows, columns) as AWQ packs them, in the order of their columns."""
    eights = numbers.reshape(len(numbers), -1, len(AWQ_ORDER))
    result = np.empty_like(eights)
    result[:, :, AWQ_ORDER] = eights
    return result.reshape(numbers.shape)


def _ordered(numbers: Array) -> Array:
    """Numbers (rows, columns) in the order in which AWQ packs them."""
    eights = numbers.reshape(len(numbers), -1, len(AWQ_ORDER))
    return eights[:, :, AWQ_ORDER].reshape(numbers.shape)


def scaled(numbers: Array, zeros: Array, scales: Array, order: Array) -> Array:
    """The weight (out, in) of numbers (out, in); zeros and scales are (groups, out)."""
    count = len(scales)
    if numbers.shape[1] % count or (order != evenly(numbers.shape[1], count)).any():
        shifted = (numbers - zeros.T[:, order]).astype(np.float32)
        return np.multiply(shifted, scales.T[:, order], out=shifted)
    grouped = numbers.reshape(len(numbers), count, -1)
    shifted = (grouped - zeros.T[:, :, None]).astype(np.float32)
    return np.multiply(shifted, scales.T[:, :, None], out=shifted).reshape(numbers.shape)


def requantised(
    values: Array, zeros: Array, scales: Array, order: Array, allowed: range, laid_out: Grid
) -> Array:
    """Numbers (out, in) for a weight; zeros and scales (groups, out) change in place where needed.

    ``allowed`` are the zeros that can be written, and end with the largest number; ``laid_out``
    gives the grid of a group's own values.
    """
    top, numbers = allowed[-1], np.empty(values.shape[::-1], np.uint8)
    for groups, columns in _alike(order, len(scales), len(values)):
        zero, scale, mine = zeros[groups], scales[groups], values.T[columns]
        grids = [(zero, scale), laid_out(mine, zero, scale.dtype, allowed)]
        placed = [_placed(mine, *grid, top) for grid in grids]
        errors = [_squares(each, *grid, mine) for each, grid in zip(placed, grids, strict=True)]
        fresh = ~(errors[0] <= errors[1])
        numbers[columns] = np.where(fresh[:, None], placed[1], placed[0])
        zero[fresh], scale[fresh] = grids[1][0][fresh], grids[1][1][fresh]
    return numbers.T


def _squares(numbers: Array, zero: Array, scale: Array, values: Array) -> Array:
    """How far each group's values are from what its numbers mean, rounded as it is read.

    What a group means is then 0 from itself, and no other grid is nearer.
    """
    error = numbers - zero.astype(np.float32)[:, None]
    error *= scale.astype(np.float32)[:, None]
    error -= values
    found: Array = np.square(error, out=error).sum(1, dtype=np.float64)
    return found


def _alike(order: Array, count: int, rows: int) -> Iterator[tuple[slice, Array]]:
    """Groups that are computed at once, as many as have few enough elements: (groups, inputs)."""
    sizes = np.bincount(order, minlength=count)
    ends, columns = np.cumsum(sizes), np.argsort(order, kind="stable")
    step = max(1, AT_ONCE // max(1, rows * int(sizes[0]))) if (sizes == sizes[0]).all() else 1
    for first in range(0, count, step):
        last = min(first + step, count)
        mine = columns[ends[first] - sizes[first] : ends[last - 1]]
        yield slice(first, last), mine.reshape(last - first, sizes[first])


def _placed(values: Array, zero: Array, scale: Array, top: int) -> Array:
    """The number of each value (groups, inputs of each, out) in its group's grid, in fp32."""
    numbers = np.rint(values * inverse(scale)[:, None])
    numbers += zero.astype(np.float32)[:, None]
    return np.clip(numbers, 0, top, out=numbers)


def _symmetric(
    values: Array, zero: Array, dtype: np.dtype[Any], allowed: range
) -> tuple[Array, Array]:
    """The grid that holds each group's values about the zero that it has."""
    low, high = values.min(1, initial=0), values.max(1, initial=0)
    return zero, np.maximum(high / (allowed[-1] - zero), -low / zero).astype(dtype)


def from_end_to_end(
    values: Array, zero: Array, dtype: np.dtype[Any], allowed: range
) -> tuple[Array, Array]:
    """The grid that reaches from each group's smallest value to its largest."""
    low, high = values.min(1, initial=0), values.max(1, initial=0)
    scale = ((high - low) / allowed[-1]).astype(dtype)
    place = np.rint(-low * inverse(scale))
    return np.clip(place, allowed[0], allowed[-1]).astype(zero.dtype), scale


def _grid(words: Array, bits: int, less: int = 0) -> Grid:
    """How the grids of a weight are laid out, by the words of all of its zeros."""
    middle = np.full((1, WORD // bits), 2 ** (bits - 1) - less)
    return _symmetric if bool((words == packed(middle, bits)).all()) else from_end_to_end


def _bands(bits: int) -> Bands:
    """Rows of the weight, which are columns of its parts, by bits of its zeros."""
    packed = PartCut(1, bits, WORD)
    return Bands(
        ROWS, {"weight": packed, "zeros": packed, "scales": PartCut(1)}, {ALL_ZEROS: "zeros"}
    )


def _gptq_bands(parts: Parts, said: Said) -> Bands:
    by_rows = _bands(said["bits"])
    return replace(by_rows, cut={**by_rows.cut, "weight": PartCut(1)})


def _refuses_gptq(said: Said) -> str | None:
    return None if said.get("bits") in (2, 4, 8) else f"GPTQ in {said.get('bits')} bits"


def _refuses_awq(said: Said) -> str | None:
    version = str(said.get("version", "gemm")).lower()
    if said.get("bits", said.get("w_bit", 4)) != 4 or version != "gemm":
        return f"AWQ in {said.get('bits')} bits, version {version}"
    return None


PARTS = {"weight": ".qweight", "zeros": ".qzeros", "scales": ".scales"}
GPTQ = Codec(
    "gptq",
    {**PARTS, "groups": ".g_idx"},
    lambda parts, said: (parts["weight"].shape[1], parts["weight"].shape[0] * WORD // said["bits"]),
    _gptq,
    _pack_gptq,
    _refuses_gptq,
    ("groups",),
    bands=_gptq_bands,
)
AWQ = Codec(
    "awq",
    PARTS,
    lambda parts, said: (parts["weight"].shape[1] * WORD // 4, parts["weight"].shape[0]),
    _awq,
    _pack_awq,
    _refuses_awq,
    bands=lambda parts, said: _bands(4),
)
