"""Rows of weights that codecs keep, decoded a band at a time: few of them are in memory at once."""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm

from peftsurgery.checkpoint.arrays import Array
from peftsurgery.checkpoint.codecs.coded import CodedWeight


class DecodedRows:
    """Rows of some weights, asked for from the first to the last."""

    def __init__(self, coded: Mapping[str, CodedWeight]) -> None:
        self._coded = coded
        self._last: dict[str, tuple[int, Array]] = {}

    @property
    def unit(self) -> int:
        """How many rows the bands of all of the weights have, or a divisor of it."""
        bands = (weight.bands for weight in self._coded.values())
        return lcm(*(each.rows for each in bands if each is not None))

    def values(self, name: str, rows: slice | None) -> Array:
        """Rows of a weight in fp32; all of them for None. PSG416 for parts that do not fit."""
        weight = self._coded[name]
        count = weight.tensor.shape[0]
        start, stop = (0, count) if rows is None else (rows.start, rows.stop)
        first, held = self._last.get(name, (0, None))
        if held is None or not first <= start <= stop <= first + len(held):
            first, held = self._decoded(weight, start, stop)
            self._last[name] = first, held
        return held[start - first : stop - first]

    def _decoded(self, weight: CodedWeight, start: int, stop: int) -> tuple[int, Array]:
        """The bands that hold some rows, and the row that they begin with."""
        count = weight.tensor.shape[0]
        if weight.bands is None or (start, stop) == (0, count):
            return 0, weight.values()
        unit = weight.bands.rows
        first, last = start // unit * unit, min(-(-stop // unit) * unit, count)
        return first, weight.values(slice(first, last))
