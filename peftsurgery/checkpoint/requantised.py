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
from peftsurgery.checkpoint.fold_tensor import Folding, FoldMeasure, check_finite


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
        for rows, before, exact in self._blocks(name):
            parts = weight.stored(rows)
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                now = {**parts, **weight.codec.encode(exact, parts, weight.said)}
                written = weight.values_of(now, rows)
                if not made.measure.add_quantised(before, exact, written, weight.tensor.dtype):
                    check_finite(name, weight.codec.name, before, exact, written)
            for key, value in now.items():
                done[weight.parts[key][1].name].append(as_bytes(value))
        made.parts = {tensor: b"".join(blocks) for tensor, blocks in done.items()}

    def _blocks(self, name: str) -> Iterator[tuple[slice | None, Array, Array]]:
        """A weight before and after: rows of it, or all of one that is not kept by rows."""
        blocks, start = self._folding.exact(name), 0
        if not self._view.coded[name].codec.by_rows:
            before, after = zip(*blocks, strict=True)
            yield None, np.concatenate(before), np.concatenate(after)
            return
        for was, now in blocks:
            yield slice(start, start + len(was)), was, now
            start += len(was)
