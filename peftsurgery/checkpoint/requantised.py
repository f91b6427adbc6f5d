"""Weights that are quantised again after a fold: all parts of one made at once, band by band."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from peftsurgery.checkpoint.arrays import Array
from peftsurgery.checkpoint.codecs.coded import CodedWeight
from peftsurgery.checkpoint.fold_site import BLOCK
from peftsurgery.checkpoint.fold_tensor import Folding, FoldMeasure, check_finite


@dataclass(frozen=True)
class PartBand:
    """What of a part belongs to a band: ``values``, which begin at ``start`` along ``axis``."""

    part: str
    axis: int
    start: int
    values: Array


def requantised(folding: Folding, name: str, measure: FoldMeasure) -> Iterator[PartBand]:
    """Make the parts of a changed weight in its codec, band by band, and fill its ``measure``.

    Raises SurgeryError: PSG402 for what the codec cannot hold, PSG403 for NaN or infinity.
    """
    weight = folding.coded[name]
    cut = {} if weight.bands is None else weight.bands.cut
    for rows, before, exact in _bands(folding, name):
        parts = weight.stored(rows)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            now = {**parts, **weight.codec.encode(exact, parts, weight.said)}
            _measure(weight, measure, exact, before, weight.values_of(now, rows))
        for key in weight.parts:
            if rows is not None and key in cut:
                yield PartBand(key, cut[key].axis, cut[key].of(rows).start, now[key])
            elif rows is None or rows.start == 0:
                yield PartBand(key, 0, 0, now[key])


def _measure(
    weight: CodedWeight, measure: FoldMeasure, exact: Array, before: Array, written: Array
) -> None:
    """Add rows to the measure of a weight, so few at a time that they stay in the cache."""
    step = max(1, BLOCK * len(exact) // max(exact.size, 1))
    for start in range(0, len(exact), step):
        part = slice(start, start + step)
        values = before[part], exact[part], written[part]
        if not measure.add_quantised(*values, weight.tensor.dtype):
            check_finite(weight.tensor.name, weight.codec.name, *values)


def _bands(folding: Folding, name: str) -> Iterator[tuple[slice | None, Array, Array]]:
    """A weight as it was and as it is to be: a band of rows, or all of one that has none."""
    weight, start = folding.coded[name], 0
    count, bands = weight.tensor.shape[0], weight.bands
    unit = None if bands is None or bands.is_closed else bands.rows
    gathered = list[tuple[Array, Array]]()
    for before, now in folding.exact(name):
        gathered.append((before, now))
        end = start + sum(len(each) for each, _ in gathered)
        if end == count or (unit is not None and not end % unit):
            was, to_be = (_joined(values) for values in zip(*gathered, strict=True))
            yield None if unit is None else slice(start, end), was, to_be
            start, gathered = end, []


def _joined(blocks: tuple[Array, ...]) -> Array:
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
