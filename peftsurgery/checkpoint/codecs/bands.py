"""Bands of a weight that a codec keeps: rows of it that are read and written by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import gcd


@dataclass(frozen=True)
class PartCut:
    """What of a part belongs to some rows of the weight: ``size`` places for ``rows`` rows.

    They are counted along ``axis`` of the part.
    """

    axis: int = 0
    size: int = 1
    rows: int = 1

    def of(self, rows: slice) -> slice:
        """The places that rows have, which begin with those of a block."""
        return slice(rows.start * self.size // self.rows, -(-rows.stop * self.size // self.rows))


@dataclass(frozen=True)
class Bands:
    """How the parts of a weight are cut with its rows, along the first axis of the weight.

    A band begins at a multiple of ``rows``. Parts that are not ``cut`` belong to each band as a
    whole; so do, under the names given there, ``whole`` ones beside what is cut of them. Where a
    weight ``is_closed``, what one band becomes when it is written depends on the others.
    """

    rows: int
    cut: Mapping[str, PartCut]
    whole: Mapping[str, str] = field(default_factory=dict)
    is_closed: bool = False


def rows_of_blocks(columns: int, block: int) -> int:
    """The fewest rows of so many columns that are whole blocks of numbers."""
    return block // gcd(columns, block)
