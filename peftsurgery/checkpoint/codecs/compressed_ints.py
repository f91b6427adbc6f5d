"""Whole numbers of compressed-tensors: packed into words of 32 bits, or one a byte.

    W[o, i] = scale[o, g] * (q[o, i] - zero[o, g]),  g the group of input i

q and zeros are signed numbers of 2 to 8 bits. "pack-quantized" keeps them plus half of their range,
q along the inputs, zeros along the outputs, the lowest bits first, and the shape of the weight in
weight_shape; a row that does not fill its last word is filled up. "int-quantized" and
"naive-quantized" keep a number a byte. A scale is that of the tensor, of a row ("channel"), or of a
group of inputs that follow one another, or that weight_g_idx names (-1 for those that do not); the
package once permuted the inputs by it. compressed-tensors 0.20,
`compressors/pack_quantized/base.py`, `compressors/naive_quantized/base.py` and
`quantization/lifecycle/forward_helpers.py`: it multiplies in the dtype of the scales, here that is
done in fp32.

What is quantised again may get the grid that the package would give it (`calculate_qparams` in
`quantization/utils/helpers.py`): about 0 with the step largest / half of the range, or from the
smallest value to the largest; see :mod:`.nearest`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from peftsurgery.checkpoint.arrays import FLOATS, Array
from peftsurgery.checkpoint.codecs.bands import Bands, PartCut
from peftsurgery.checkpoint.codecs.codec import Codec, Parts, Said
from peftsurgery.checkpoint.codecs.packed import (
    WORD,
    evenly,
    from_end_to_end,
    packed,
    requantised,
    scaled,
    unpacked,
)
from peftsurgery.checkpoint.codecs.schemes import (
    ACTIVATIONS,
    INTS,
    PACKED,
    PLAIN,
    Scheme,
    bands_of,
    caches,
    checked_scales,
    has_parts,
    own_scheme,
    refused,
    scheme_reader,
)

WORDS = np.dtype(np.int32)


def _shape(parts: Parts, said: Said) -> tuple[int, int]:
    """The shape of the weight, once all parts are seen to have theirs. ValueError."""
    scheme, weight = own_scheme(said), parts["weight"]
    has_parts(parts, scale=FLOATS.values(), order=(WORDS, np.dtype(np.int64)))
    has_parts(parts, weight=(WORDS if "shape" in parts else np.dtype(np.int8),))
    if weight.ndim != 2:
        raise ValueError(f"its numbers are {list(weight.shape)}, which is no matrix")
    rows, columns = weight.shape
    if "shape" in parts:
        said_rows, columns = (int(size) for size in parts["shape"].reshape(-1))
        words = -(-columns * scheme.bits // WORD)
        if (rows, weight.shape[1]) != (said_rows, words):
            shapes = f"{list(weight.shape)}, not {[said_rows, words]}"
            raise ValueError(f"weight_packed is {shapes} for {scheme.bits} bits")
    table = scheme.table((rows, columns))
    checked_scales(parts["scale"], table)
    _check_zeros(parts, scheme, (rows, table[1]))
    if "order" in parts and parts["order"].shape != (columns,):
        raise ValueError(f"weight_g_idx is {list(parts['order'].shape)}, not {[columns]}")
    if "order" not in parts and scheme.ordered:
        raise ValueError("it has groups by the order of a calibration, and no weight_g_idx")
    return rows, columns


def _check_zeros(parts: Parts, scheme: Scheme, table: tuple[int, int]) -> None:
    """Refuse zeros that are no table like the scales, in numbers or in words. ValueError."""
    if "zeros" not in parts:
        if not scheme.symmetric:
            raise ValueError("it is not symmetric, and has no weight_zero_point")
        return
    zeros = parts["zeros"]
    has_parts(parts, zeros=(WORDS, np.dtype(np.int8)))
    if not _are_packed(zeros):
        if zeros.shape != parts["scale"].shape:
            raise ValueError(f"weight_zero_point is {list(zeros.shape)}, unlike weight_scale")
        return
    words = (-(-table[0] * scheme.bits // WORD), table[1])
    if zeros.shape != words or scheme.strategy == "tensor":
        raise ValueError(f"weight_zero_point is {list(zeros.shape)}, not {list(words)}")


def _are_packed(zeros: Array) -> bool:
    return zeros.dtype == WORDS


def _unsigned(parts: Parts, scheme: Scheme) -> tuple[Array, Array]:
    """Numbers (out, in) and zeros (groups, out), each plus half of the range."""
    half = 2 ** (scheme.bits - 1)
    weight, scale = parts["weight"], parts["scale"]
    if "shape" in parts:
        numbers = unpacked(weight, scheme.bits)[:, : int(parts["shape"][-1])]
    else:
        numbers = weight.astype(np.int32) + half
    if "zeros" not in parts:
        return numbers, np.full(_by_groups(scale, len(numbers), scheme).shape, half, np.int32)
    zeros = parts["zeros"]
    if _are_packed(zeros):
        words = np.ascontiguousarray(zeros.T)
        return numbers, unpacked(words, scheme.bits)[:, : len(numbers)]
    return numbers, _by_groups(zeros.astype(np.int32) + half, len(numbers), scheme)


def _by_groups(table: Array, rows: int, scheme: Scheme) -> Array:
    """A table of scales or zeros as (groups, out); of a tensor that is one row, (1, 1)."""
    return table.reshape(1 if scheme.strategy == "tensor" else rows, -1).T


def _laid(values: Array, scheme: Scheme) -> Array:
    """A weight in rows that have scales of their own; :func:`_by_groups` counts them."""
    return values.reshape(1, -1) if scheme.strategy == "tensor" else values


def _groups(parts: Parts, inputs: int, count: int) -> Array:
    """The group of each input. ValueError if they are not of one size."""
    order = parts.get("order")
    if order is None or (order < 0).any():
        return evenly(inputs, count)
    if (np.bincount(order, minlength=count) != inputs // count).any():
        raise ValueError("weight_g_idx names groups of different sizes")
    return order


def _decode(parts: Parts, said: Said) -> Array:
    scheme = own_scheme(said)
    numbers, zeros = _unsigned(parts, scheme)
    scales = _by_groups(parts["scale"], len(numbers), scheme).astype(np.float32)
    laid = _laid(numbers, scheme)
    groups = _groups(parts, laid.shape[1], len(scales))
    return scaled(laid, zeros, scales, groups).reshape(numbers.shape)


def _encode(values: Array, parts: Parts, said: Said) -> dict[str, Array]:
    scheme, scale = own_scheme(said), parts["scale"]
    half, rows = 2 ** (scheme.bits - 1), len(values)
    _, zeros = _unsigned(parts, scheme)
    scales, zeros = _by_groups(scale, rows, scheme).copy(), zeros.copy()
    laid = _laid(values, scheme)
    groups = _groups(parts, laid.shape[1], len(scales))
    grid = _about_zero if scheme.symmetric else from_end_to_end
    numbers = requantised(laid, zeros, scales, groups, range(2**scheme.bits), grid)
    numbers = numbers.reshape(values.shape)
    made = {"scale": scales.T.reshape(scale.shape)}
    if "shape" in parts:
        made["weight"] = packed(_filled(numbers, scheme.bits), scheme.bits)
    else:
        made["weight"] = (numbers.astype(np.int16) - half).astype(np.int8)
    if "zeros" in parts and _are_packed(parts["zeros"]):
        made["zeros"] = np.ascontiguousarray(packed(_filled(zeros, scheme.bits), scheme.bits).T)
    elif "zeros" in parts:
        made["zeros"] = (zeros - half).astype(np.int8).T.reshape(scale.shape)
    return made


def _filled(numbers: Array, bits: int) -> Array:
    """Numbers (rows, columns) with as many zeros behind them as fill the last word."""
    return np.pad(numbers, ((0, 0), (0, -numbers.shape[1] % (WORD // bits))))


def _about_zero(
    values: Array, zero: Array, dtype: np.dtype[Any], allowed: range
) -> tuple[Array, Array]:
    """The grid whose range is as long as from the value farthest from 0 to its opposite."""
    largest = np.abs(values).max(1, initial=0)
    return zero, (largest / np.float32(allowed[-1] / 2)).astype(dtype)


def _bands(parts: Parts, said: Said) -> Bands:
    scheme, more = own_scheme(said), dict[str, PartCut]()
    if "zeros" in parts:
        is_packed = _are_packed(parts["zeros"])
        more["zeros"] = PartCut(0, scheme.bits, WORD) if is_packed else PartCut()
    return bands_of(scheme, _shape(parts, said), **more)


OPTIONAL = {"zeros": ".weight_zero_point", "order": ".weight_g_idx", **ACTIVATIONS}
PACKED_INTS = Codec(
    "compressed-tensors packed",
    {"weight": ".weight_packed", "scale": ".weight_scale", "shape": ".weight_shape", **OPTIONAL},
    _shape,
    _decode,
    _encode,
    refused,
    tuple(OPTIONAL),
    ("shape",),
    bands=_bands,
    scheme=scheme_reader((PACKED,), INTS),
    aside=caches,
)
PLAIN_INTS = Codec(
    "compressed-tensors int",
    {"weight": ".weight", "scale": ".weight_scale", **OPTIONAL},
    _shape,
    _decode,
    _encode,
    refused,
    tuple(OPTIONAL),
    bands=_bands,
    scheme=scheme_reader(PLAIN, INTS),
    aside=caches,
)
