"""Weights that are quantised again after a fold: all parts of one made at once.

The parts lie in several places, maybe in several files, and are asked for one after the other. What
was made last is kept, a weight for each thread and one more; what is asked for later is made again,
of the same bytes.
"""

from __future__ import annotations

import os
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Lock

import numpy as np

from peftsurgery.checkpoint.arrays import Array, as_bytes
from peftsurgery.checkpoint.codecs.coded import PlainView
from peftsurgery.checkpoint.fold_tensor import BLOCK, Folding, FoldMeasure, check_finite


@dataclass
class _Packed:
    """A weight's parts by the names of their tensors, as bytes, and how far it was changed."""

    lock: Lock = field(default_factory=Lock)
    parts: dict[str, bytes] = field(default_factory=dict)
    measure: FoldMeasure = field(default_factory=FoldMeasure)


class Requantised:
    """The changed weights of a fold, in the codecs of the base."""

    def __init__(self, folding: Folding, view: PlainView) -> None:
        """``view`` says which weights are quantised again."""
        self._folding, self._view = folding, view
        self._made = OrderedDict[str, _Packed]()
        self._room, self._lock = 1 + len(os.sched_getaffinity(0)), Lock()

    def part(self, tensor: str) -> tuple[bytes, FoldMeasure | None]:
        """The bytes of a tensor that is part of a weight; with the first part, its measure.

        Raises SurgeryError: PSG402 for what the codec cannot hold, PSG403 for NaN or infinity.
        """
        name = self._view.again_by_part[tensor]
        with self._lock:
            made = self._made.setdefault(name, _Packed())
            self._made.move_to_end(name)
            while len(self._made) > self._room:
                self._made.popitem(last=False)
        with made.lock:
            if not made.parts:
                self._make(name, made)
        is_first = tensor == self._view.coded[name].parts["weight"][1].name
        return made.parts[tensor], made.measure if is_first else None

    def _make(self, name: str, made: _Packed) -> None:
        weight, done = self._view.coded[name], defaultdict[str, list[memoryview]](list)
        for rows, exact in self._blocks(name):
            parts = weight.stored(rows)
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                now = {**parts, **weight.codec.encode(exact, parts, weight.said)}
                both = weight.values_of(parts, rows), weight.values_of(now, rows)
                self._measure(name, made.measure, exact, *both)
            for key, value in now.items():
                done[weight.parts[key][1].name].append(as_bytes(value))
        made.parts = {tensor: b"".join(blocks) for tensor, blocks in done.items()}

    def _measure(
        self, name: str, measure: FoldMeasure, exact: Array, before: Array, written: Array
    ) -> None:
        """Add a weight to its measure, so few rows at a time that they stay in the cache."""
        weight = self._view.coded[name]
        step = max(1, BLOCK * len(exact) // max(exact.size, 1))
        for start in range(0, len(exact), step):
            part = slice(start, start + step)
            values = before[part], exact[part], written[part]
            if not measure.add_quantised(*values, weight.tensor.dtype):
                check_finite(name, weight.codec.name, *values)

    def _blocks(self, name: str) -> Iterator[tuple[slice | None, Array]]:
        """A weight as it is to be: rows of it, or all of one that is not kept by rows."""
        weight, start = self._view.coded[name], 0
        exact = np.empty(0 if weight.codec.by_rows else weight.tensor.shape, np.float32)
        for _, now in self._folding.exact(name):
            rows = slice(start, start + len(now))
            start = rows.stop
            if weight.codec.by_rows:
                yield rows, now
            else:
                exact[rows] = now
        if not weight.codec.by_rows:
            yield None, exact
