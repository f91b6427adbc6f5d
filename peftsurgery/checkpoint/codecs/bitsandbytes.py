"""bitsandbytes: four bits with a table and a largest value for each block, and eight bits by rows.

    four bits: W.flat[k] = table[q[k]] * absmax[k // blocksize], two numbers a byte, the first in
    the high bits; with double quantisation absmax is itself a byte in another table:
    absmax[b] = nested_table[a[b]] * nested_absmax[b // nested_blocksize] + offset
    eight bits: W[i, j] = weight[i, j] * SCB[i] / 127

Dettmers et al., 2023, arXiv:2305.14314, section 3; Dettmers et al., 2022, arXiv:2208.07339. The
tables, block sizes and the shape are in the file (`quant_state`, a JSON text). A weight that is
quantised again has the numbers nearest to its values, as bitsandbytes rounds, and the scales that
:mod:`.nearest` says; the offset of nested scales stays.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from peftsurgery.checkpoint.arrays import Array
from peftsurgery.checkpoint.codecs.bands import Bands, PartCut, rows_of_blocks
from peftsurgery.checkpoint.codecs.codec import Codec, Parts, Said
from peftsurgery.checkpoint.codecs.nearest import inverse, nearer_scales
from peftsurgery.checkpoint.tensor_bytes import CHUNK

FEW = 16  # numbers of a table


def state_of(parts: Parts) -> dict[str, Any]:
    """What the file says of a weight in four bits."""
    found: dict[str, Any] = json.loads(parts["state"].tobytes())
    return found


def _four_bits(parts: Parts, said: Said) -> Array:
    state, table = state_of(parts), parts["table"].astype(np.float32)
    packed = parts["weight"].reshape(-1)
    numbers = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    whole, columns = state["shape"]
    rows = min(whole, numbers.size // columns)
    values = table[numbers[: rows * columns]]
    scale = np.repeat(_largest(parts, state), state["blocksize"])[: values.size]
    return np.multiply(values, scale, out=values).reshape(rows, columns)


def _largest(parts: Parts, state: Said) -> Array:
    """The largest value of each block."""
    absmax = parts["absmax"].reshape(-1)
    if "nested_absmax" not in parts:
        return absmax.astype(np.float32)
    outer = np.repeat(parts["nested_absmax"].astype(np.float32), state["nested_blocksize"])
    inner = parts["nested_table"].astype(np.float32)[absmax]
    return inner * outer[: absmax.size] + np.float32(state["nested_offset"])


def _pack_four(values: Array, parts: Parts, said: Said) -> dict[str, Array]:
    state, nearest = state_of(parts), _Nearest(parts["table"])
    blocks = _blocks(values, state["blocksize"])
    absmax = nearest.scales(blocks, _largest(parts, state))
    made = {"absmax": absmax}
    if "nested_absmax" in parts:
        outer, offset = _Nearest(parts["nested_table"]), np.float32(state["nested_offset"])
        shifted = _blocks(absmax - offset, state["nested_blocksize"])
        scales = outer.scales(shifted, parts["nested_absmax"].astype(np.float32))
        numbers = outer.numbers(shifted, scales).reshape(-1)[: absmax.size]
        made = {"absmax": numbers, "nested_absmax": scales}
        absmax = _largest({**parts, **made}, state)
    pairs = nearest.numbers(blocks, absmax).reshape(-1, 2)
    made["weight"] = (pairs[:, 0] << 4 | pairs[:, 1])[: parts["weight"].size]
    return {n: value.reshape(parts[n].shape).astype(parts[n].dtype) for n, value in made.items()}


def _blocks(values: Array, size: int) -> Array:
    """Values as (blocks, size), the last block filled up with zeros."""
    flat = values.reshape(-1)
    return np.pad(flat, (0, -flat.size % size)).reshape(-1, size)


class _Nearest:
    """The numbers of a table by what they are near to."""

    def __init__(self, table: Array) -> None:
        self.table = table.astype(np.float32)
        self._order = np.argsort(self.table).astype(np.uint8)
        ascending = self.table[self._order]
        self._middles = (ascending[1:] + ascending[:-1]) / 2

    def __call__(self, values: Array) -> Array:
        """The place in the table of the number nearest to each value."""
        if len(self._middles) > FEW:
            return self._order[np.searchsorted(self._middles, values)]
        place = np.zeros(values.shape, np.uint8)
        for middle in self._middles:  # several times as fast as a search, for so few
            place += values > middle
        return self._order[place]

    def scales(self, blocks: Array, kept: Array) -> Array:
        """The scale of each block: the one that is kept, or its largest value."""
        fresh = np.abs(blocks).max(1)
        parts = (
            nearer_scales(blocks[rows], kept[rows], fresh[rows], lambda x: self.table[self(x)])
            for rows in _chunks(blocks)
        )
        return np.concatenate([*parts])

    def numbers(self, blocks: Array, scales: Array) -> Array:
        """The places in the table of all values."""
        found, inverses = np.empty(blocks.shape, np.uint8), inverse(scales)[:, None]
        for rows in _chunks(blocks):
            found[rows] = self(blocks[rows] * inverses[rows])
        return found


def _chunks(blocks: Array) -> Iterator[slice]:
    """Rows that are computed at once."""
    step = max(1, CHUNK // blocks.shape[1])
    return (slice(start, start + step) for start in range(0, len(blocks), step))


def _pack_eight(values: Array, parts: Parts, said: Said) -> dict[str, Array]:
    weight, scales = np.empty(values.shape, np.int8), parts["scale"].copy()
    step = np.float32(127)
    for rows in _chunks(values):
        mine, kept = values[rows], parts["scale"][rows].astype(np.float32) / step
        scale = nearer_scales(mine, kept, np.abs(mine).max(1) / step, _whole)
        scales[rows] = np.where(scale == kept, scales[rows], scale * step)
        weight[rows] = _whole(mine * inverse(scale)[:, None])
    return {"weight": weight, "scale": scales}


def _whole(values: Array) -> Array:
    """Whole numbers from -127 to 127."""
    return np.clip(np.rint(values), -127, 127)


def _eight_bits(parts: Parts, said: Said) -> Array:
    scale = parts["scale"].astype(np.float32)[:, None] / np.float32(127)
    return parts["weight"].astype(np.float32) * scale


def _shape(parts: Parts, said: Said) -> tuple[int, int]:
    rows, columns = state_of(parts)["shape"]
    return rows, columns


def _four_bands(parts: Parts, said: Said) -> Bands | None:
    """Rows whose numbers are whole blocks of blocks."""
    state = state_of(parts)
    if any(parts[name].shape[0] != parts[name].size for name in ("weight", "absmax")):
        return None
    (_, columns), block = state["shape"], state["blocksize"]
    nested = block * state["nested_blocksize"] if "nested_absmax" in parts else block
    cut = {
        "weight": PartCut(0, columns, 2),
        "absmax": PartCut(0, columns, block),
        "nested_absmax": PartCut(0, columns, nested),
    }
    return Bands(rows_of_blocks(columns, nested), cut)


def _four(kind: str) -> Codec:
    return Codec(
        f"bitsandbytes {kind}",
        {
            "weight": ".weight",
            "absmax": ".weight.absmax",
            "table": ".weight.quant_map",
            "nested_absmax": ".weight.nested_absmax",
            "nested_table": ".weight.nested_quant_map",
            "state": f".weight.quant_state.bitsandbytes__{kind}",
        },
        _shape,
        _four_bits,
        _pack_four,
        optional=("nested_absmax", "nested_table"),
        small=("state",),
        bands=_four_bands,
    )


NF4, FP4 = _four("nf4"), _four("fp4")
INT8 = Codec(
    "bitsandbytes int8",
    {"weight": ".weight", "scale": ".SCB", "format": ".weight_format"},
    lambda parts, said: (parts["weight"].shape[0], parts["weight"].shape[1]),
    _eight_bits,
    _pack_eight,
    optional=("format",),
    bands=lambda parts, said: Bands(1, {"weight": PartCut(), "scale": PartCut()}),
)
