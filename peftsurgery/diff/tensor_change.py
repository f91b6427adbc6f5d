"""measure_change: how far one tensor is from another, and what that looks like.

Norms, the largest change, NaN and whether it is a rounding are those of all elements, taken in one
pass over the rows while they are in the processor's cache. What else is said is foreseen from a
sample of rows, so that the same pass can confirm it (:mod:`peftsurgery.diff.tensor_rank`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftsurgery.diff.tensor_pair import RowsOfBoth, TensorPair, pair_of
from peftsurgery.diff.tensor_rank import Spectrum, foreseen, searched

_EXPONENT = {torch.float32: 8, torch.float64: 11}
"""How many bits of a number are its exponent."""
SPARSE = 1 / 8
"""Up to this share of changed numbers, they are taken out to be looked at."""


@dataclass(frozen=True)
class Change:
    """What became of a tensor.

    ``relative`` is the norm of the change over that of the first tensor, ``largest`` its largest
    element. ``ulps`` is the largest change in units of the last place of the coarser dtype, and at
    least that if it is over one and the tensor large; ``sign_flips`` a share of the elements. Of
    large tensors (over 2^18 elements) these two are those of a sample: 128 even rows, or as many
    runs of 2,048 elements. ``rank`` is the numerical rank of the change if it is low;
    ``stable_rank`` its squared Frobenius norm over its largest squared singular value, of which
    ``top_share`` is the inverse; both are None unless the tensor has two dimensions and no NaN. The
    singular value is a lower bound, close where it stands out. ``not_finite`` counts NaN and Inf of
    both.
    """

    verdict: str
    relative: float = 0.0
    largest: float = 0.0
    ulps: float = 0.0
    sign_flips: float = 0.0
    not_finite: tuple[int, int] = (0, 0)
    rank: int | None = None
    stable_rank: float | None = None
    top_share: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The measures by name."""
        return asdict(self)


def measure_change(a: Tensor, b: Tensor) -> Change:
    """The change from ``a`` to ``b``, which have one shape and any dtypes."""
    return measure_pair(pair_of(a, b))


def measure_pair(pair: TensorPair) -> Change:
    """The change between two tensors, wherever they are."""
    floating = all(dtype.is_floating_point for dtype in pair.dtypes)
    if not pair.count or not floating:
        return _counted(pair)
    sample = pair.sample()
    if not sample.delta.any() and pair.is_equal():
        return Change("identical")
    eps = max(torch.finfo(dtype).eps for dtype in pair.dtypes)
    seen = foreseen(pair, sample, eps)
    totals = _totals(pair, sample, seen.directions)
    if not math.isfinite(totals.delta + totals.one):
        counts = _not_finite(pair)
        if any(counts):
            return Change("not finite", not_finite=counts)
        pair = replace(pair, wide=torch.float64)  # their squares only were too large
        totals = _totals(pair, sample, seen.directions.double())
    if not totals.largest:
        return Change("identical")
    norm, length = math.sqrt(totals.one), math.sqrt(totals.delta)
    rounded = totals.ulps <= 1
    found: Spectrum | None = None
    if not rounded and len(pair.shape) == 2:
        noise = eps * math.sqrt(totals.other) / 2
        found = seen.confirmed(totals.images, length, noise) or searched(pair, length, noise)
    rank = None if found is None else found.rank
    return Change(
        verdict="rounding" if rounded else "low-rank" if rank is not None else "dense",
        relative=length / norm if norm else float("inf"),
        largest=totals.largest,
        ulps=totals.ulps,
        sign_flips=totals.flips,
        rank=rank,
        stable_rank=None if found is None else length**2 / found.largest**2,
        top_share=None if found is None else found.largest**2 / length**2,
    )


@dataclass
class _Totals:
    """Squares of norms and extremes of all elements, and the images of some directions.

    ``flips`` are those of the sample.
    """

    one: float = 0.0
    delta: float = 0.0
    product: float = 0.0
    largest: float = 0.0
    ulps: float = 0.0
    flips: float = 0.0
    images: list[Tensor] = field(default_factory=list)

    @property
    def other(self) -> float:
        """The square of the second tensor's norm, of those of the first one and the change."""
        return max(self.one + 2 * self.product + self.delta, 0.0)

    def add(self, part: RowsOfBoth) -> None:
        """Take some rows in."""
        one, delta = part.one.view(-1), part.delta.view(-1)
        values = delta.numpy()
        largest = max(float(values.max()), -float(values.min()))
        self.one += float(torch.dot(one, one))
        if largest:  # NaN too
            self.delta += float(torch.dot(delta, delta))
            self.product += float(torch.dot(one, delta))
            self.largest = max(self.largest, largest)


def _totals(pair: TensorPair, sample: RowsOfBoth, directions: Tensor) -> _Totals:
    signs = sample.one.sign(), sample.other.to(pair.wide).sign()
    flips = torch.count_nonzero(signs[0] * signs[1] < 0)
    scale = _Scale(pair.dtypes, pair.wide)
    totals = _Totals(ulps=scale.largest(sample), flips=int(flips) / sample.one.numel())
    for _, part in pair.stretches():
        totals.add(part)
        if directions.numel():
            totals.images.append(part.delta @ directions)
        if totals.ulps <= 1:  # else it is no rounding, whatever comes
            totals.ulps = max(totals.ulps, scale.largest(part))
    return totals


class _Scale:
    """Measures changes in units of the last place of the coarser dtype, in memory that it keeps.

    The unit is never below the smallest number of either dtype.
    """

    def __init__(self, dtypes: tuple[torch.dtype, ...], wide: torch.dtype) -> None:
        infos = [torch.finfo(dtype) for dtype in dtypes]
        self.eps = max(info.eps for info in infos)
        self.least = max(info.tiny * info.eps for info in infos)
        self.room = [torch.empty(0, dtype=wide) for _ in range(2)]

    def largest(self, part: RowsOfBoth) -> float:
        """The largest change of some rows; where few numbers changed, only these are looked at."""
        one, other, delta = (each.reshape(-1) for each in (part.one, part.other, part.delta))
        changed = delta.numpy() != 0
        count = int(np.count_nonzero(changed))
        if count < SPARSE * changed.size:
            places = torch.from_numpy(np.flatnonzero(changed))
            one, other, delta = one[places], other[places], delta[places]
        if not count:
            return 0.0
        if len(self.room[0]) < len(one):
            self.room = [torch.empty_like(one) for _ in range(2)]
        unit, change = (each[: len(one)] for each in self.room)
        torch.maximum(torch.abs(one, out=change), unit.copy_(other).abs_(), out=unit)
        self._to_units(unit)
        return float(torch.abs(delta, out=change).div_(unit).max())

    def _to_units(self, sizes: Tensor) -> None:
        """Make of each size, in place, the distance of the numbers next to it."""
        info, bits = torch.finfo(sizes.dtype), torch.int32 if sizes.itemsize == 4 else torch.int64
        # a number with its fraction's bits taken away is the power of two below it
        mask = -(1 << (8 * sizes.itemsize - _EXPONENT[sizes.dtype] - 1))
        sizes.clamp_min_(info.tiny).view(bits).bitwise_and_(mask)
        sizes.mul_(self.eps).clamp_min_(self.least)


def _counted(pair: TensorPair) -> Change:
    """The change of numbers that are no floats: the share that are others."""
    if pair.is_equal():
        return Change("identical")
    others = sum(int(torch.count_nonzero(one != other)) for _, one, other in pair.raw())
    return Change("dense", relative=others / pair.count) if others else Change("identical")


def _not_finite(pair: TensorPair) -> tuple[int, int]:
    """How many NaN and Inf each tensor has."""
    counts = [0, 0]
    for _, part in pair.stretches():
        for place, values in enumerate((part.one, part.other)):
            counts[place] += int(torch.count_nonzero(~torch.isfinite(values)))
    return counts[0], counts[1]
