"""TensorPair: two tensors of one shape, read some rows at a time.

Checkpoints are larger than memory, and memory is slower than a processor's cache: what is asked of
a pair is asked of a few rows while they are in the cache, and of all rows in one go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peftsurgery.fingerprint import Sampled
from peftsurgery.finite_tensors import DTYPES

CHUNK = 2**17
"""Elements that are read and worked on at a time."""
SMALL = 2**18
"""A tensor of up to so many elements is looked at as a whole."""
SAMPLE = 128
"""Rows that stand for a larger one, unless they have more than LARGEST elements."""
LARGEST = 2**24

Spans = Sequence[tuple[int, int]]
# The elements of some spans (first, end), in a row; in the memory given, if they must be copied.
Reader = Callable[[Spans, Tensor], Tensor]


@dataclass(frozen=True)
class RowsOfBoth:
    """Some rows of both tensors and of their difference; ``other`` is in its own dtype."""

    one: Tensor
    other: Tensor
    delta: Tensor


@dataclass(frozen=True)
class TensorPair:
    """Two tensors of ``shape``; ``wide`` is the dtype that their difference is computed in."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype]
    readers: tuple[Reader, Reader]
    wide: torch.dtype

    @property
    def count(self) -> int:
        """Number of elements of each."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """What is read by; a tensor that is no matrix has a row for each element."""
        return self.shape[0] if len(self.shape) == 2 else self.count

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.shape[1] if len(self.shape) == 2 else 1

    @property
    def is_small(self) -> bool:
        """Whether the sample is all of it."""
        return self.count <= SMALL

    def sample(self) -> RowsOfBoth:
        """Evenly spread rows of a matrix, all of a small one; of other tensors runs of elements."""
        chosen = [(0, self.count)]
        if not self.is_small:
            size = self.columns if len(self.shape) == 2 else SMALL // SAMPLE
            count = max(min(SAMPLE, self.rows, LARGEST // size), 1)
            last = (self.count - size) // self.columns
            firsts = (last * k // max(count - 1, 1) * self.columns for k in range(count))
            chosen = [(first, first + size) for first in firsts]
        size = sum(end - first for first, end in chosen)
        one, other = (
            read(chosen, torch.empty(size, dtype=dtype)).view(-1, self.columns)
            for read, dtype in zip(self.readers, self.dtypes, strict=True)
        )
        mine = one.to(self.wide)
        return RowsOfBoth(mine, other, other.to(self.wide) - mine)

    @property
    def step(self) -> int:
        """Elements of a stretch, whole rows."""
        return max(CHUNK // self.columns, 1) * self.columns

    def raw(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """All elements in order as they lie there, with the number of the first.

        Each part may overwrite the last one.
        """
        room = [torch.empty(min(self.step, self.count), dtype=dtype) for dtype in self.dtypes]
        for first in range(0, self.count, self.step):
            spans = [(first, min(first + self.step, self.count))]
            one, other = (read(spans, to) for read, to in zip(self.readers, room, strict=True))
            yield first, one, other

    def stretches(self) -> Iterator[tuple[int, RowsOfBoth]]:
        """All rows in order, with the number of the first; each stretch overwrites the last one."""
        room = [torch.empty(min(self.step, self.count), dtype=self.wide) for _ in range(2)]
        for first, one, other in self.raw():
            mine, delta = (each[: one.numel()] for each in room)
            mine.copy_(one)
            delta.copy_(other).sub_(mine)  # in place: what is worked on must stay in the cache
            parts = (each.view(-1, self.columns) for each in (mine, other, delta))
            yield first // self.columns, RowsOfBoth(*parts)

    def is_equal(self) -> bool:
        """Whether all bytes are."""
        same = self.dtypes[0] == self.dtypes[1]
        return same and all(_is_equal(one, other) for _, one, other in self.raw())


def pair_of(a: Tensor, b: Tensor) -> TensorPair:
    """Two tensors in memory."""
    return _paired(tuple(a.shape), (a.dtype, b.dtype), (_of_memory(a), _of_memory(b)))


def pair_of_stored(a: Sampled, b: Sampled) -> TensorPair | None:
    """Two tensors where they are; None for a dtype that torch has not."""
    kinds = DTYPES.get(a.dtype), DTYPES.get(b.dtype)
    if kinds[0] is None or kinds[1] is None:
        return None
    return _paired(a.shape, (kinds[0], kinds[1]), (_of_file(a), _of_file(b)))


def _paired(
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    readers: tuple[Reader, Reader],
) -> TensorPair:
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    return TensorPair(shape, dtypes, readers, wide)


def _of_memory(tensor: Tensor) -> Reader:
    flat = tensor.detach().cpu().flatten()

    def read(spans: Spans, room: Tensor) -> Tensor:
        parts = [flat[first:end] for first, end in spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return read


def _of_file(tensor: Sampled) -> Reader:
    def read(spans: Spans, room: Tensor) -> Tensor:
        found = room[: sum(end - first for first, end in spans)]
        place = found.view(torch.uint8).numpy().data
        if tensor.read_into is None:
            place[:] = tensor.read(spans)
        else:
            tensor.read_into(spans, place)
        return found

    return read


def _is_equal(one: Tensor, other: Tensor) -> bool:
    mine, theirs = (each.contiguous().view(torch.uint8).numpy() for each in (one, other))
    words = len(mine) // 8 * 8
    return np.array_equal(mine[:words].view(np.int64), theirs[:words].view(np.int64)) and (
        np.array_equal(mine[words:], theirs[words:])
    )
