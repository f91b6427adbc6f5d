"""The rank of a change: foreseen from some rows, confirmed by all of them, else searched for.

Of a sample of rows the singular values show how many directions stand out from what rounding does.
Whether these are all that the whole has, one pass decides: its images of the directions have its
singular values, and its images of random vectors at right angles to them must be as short as
rounding errors are. Where the sample misled, a sketch of the whole is taken that grows while it
finds more than noise would give it (Halko, Martinsson and Tropp, 2011, arXiv:0909.4061).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftsurgery.diff.tensor_pair import SAMPLE, RowsOfBoth, TensorPair

FIRST_SKETCH = 16
LOW = 0.25
"""A rank is low up to this share of the smaller dimension."""
ACROSS = 4
"""So many random vectors at right angles to what was foreseen."""
MARGIN = 1.25
"""What a sample must show more than a limit, so that chance is no reason."""


@dataclass(frozen=True)
class Spectrum:
    """The rank of a change if it is low, and a lower bound of its largest singular value."""

    rank: int | None
    largest: float


@dataclass(frozen=True)
class Foreseen:
    """What a sample of rows makes likely, with the directions (columns, n) that can confirm it.

    The first ``rank`` of them are said to be all that the change has; if it is None, the change
    is dense, and only the first one's image is asked for. No directions: nothing is foreseen.
    """

    directions: Tensor
    rank: int | None
    shape: tuple[int, int]

    def confirmed(self, images: Sequence[Tensor], length: float, noise: float) -> Spectrum | None:
        """The spectrum, from the images of all rows; None if the sample misled.

        ``length`` is the norm of the change, and ``noise`` bounds that of what rounding did to it.
        """
        if not images:
            return None
        whole = torch.cat(list(images))
        if self.rank is None:
            return Spectrum(None, float(torch.linalg.vector_norm(whole)))
        inner, across = whole[:, : self.rank], whole[:, self.rank :]
        free = self.shape[1] - self.rank
        left = float(across.square().sum()) / ACROSS * free / self.shape[1]
        if left > max(noise**2, 1e-8 * length**2):
            return None
        return _read(torch.linalg.svdvals(inner), noise, self.shape)


def foreseen(pair: TensorPair, sample: RowsOfBoth, eps: float) -> Foreseen:
    """What to ask of a pair, judging by its sample."""
    nothing = Foreseen(sample.delta.new_empty(pair.columns, 0), None, (pair.rows, pair.columns))
    delta, shape = sample.delta, nothing.shape
    stands_for_more = len(pair.shape) == 2 and SAMPLE == len(delta) < pair.rows
    if not stands_for_more or not math.isfinite(float(delta.square().sum())):
        return nothing
    gram = delta @ delta.T
    values, vectors = torch.linalg.eigh(gram)
    noise = eps * float(torch.linalg.vector_norm(sample.one + delta)) / 2
    sizes = values.clamp_min(0).sqrt()
    # squares of single precision hide what is below this share of the largest
    floor = max(_apart(noise, *delta.shape), 1e-3 * float(sizes[-1]))
    kept = sizes > floor
    rank = int(kept.sum())
    if not rank:
        return nothing
    # of the rows, the right singular vectors of what stands out, the largest first
    turned = (delta.T @ vectors[:, kept]).flip(1)
    if rank <= SAMPLE // 2:
        basis = torch.linalg.qr(turned).Q
        return Foreseen(torch.cat([basis, _across(basis)], 1), rank, shape)
    if _is_dense(delta, LOW * min(shape), noise):
        top = turned[:, :1]
        return Foreseen(top / torch.linalg.vector_norm(top), None, shape)
    return nothing


def searched(pair: TensorPair, length: float, noise: float) -> Spectrum:
    """The spectrum by sketches of the whole, two passes each.

    A folded adapter of rank r costs a sketch of a few times r columns, and a change whose singular
    values are all alike the first sketch alone.
    """
    rows, columns = pair.rows, pair.columns
    smaller = min(rows, columns)
    generator = torch.Generator().manual_seed(0)
    width = min(FIRST_SKETCH, smaller)
    while True:
        random = torch.randn(columns, width, generator=generator, dtype=pair.wide)
        basis = torch.linalg.qr(torch.cat([p.delta @ random for _, p in pair.stretches()])).Q
        inner = torch.zeros(width, columns, dtype=pair.wide)
        for first, part in pair.stretches():
            inner.addmm_(basis[first : first + len(part.delta)].T, part.delta)
        values = torch.linalg.svdvals(inner)
        found = _read(values, noise, (rows, columns))
        rank = int((values > _floor(values, noise, (rows, columns))).sum())
        if rank < width or width == smaller:
            return found
        held = float(torch.linalg.vector_norm(values)) ** 2
        if held < 4 * length**2 * width / smaller or width > LOW * smaller:
            return Spectrum(None, found.largest)
        width = min(4 * width, smaller)


def _read(values: Tensor, noise: float, shape: tuple[int, int]) -> Spectrum:
    """The rank of what has these singular values, if it is low."""
    rank = int((values > _floor(values, noise, shape)).sum())
    return Spectrum(rank if rank <= LOW * min(shape) else None, float(values[0]))


def _floor(values: Tensor, noise: float, shape: tuple[int, int]) -> float:
    return max(_apart(noise, *shape), float(values[0]) * 1e-5)


def _apart(noise: float, rows: int, columns: int) -> float:
    """The largest singular value of rounding errors that have this norm together."""
    return noise * (rows**0.5 + columns**0.5) / (rows * columns) ** 0.5


def _across(basis: Tensor) -> Tensor:
    """Random vectors at right angles to a basis, each as long as one of so many numbers is."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(len(basis), ACROSS, generator=generator, dtype=basis.dtype)
    inner = random - basis @ (basis.T @ random)
    length = torch.linalg.vector_norm(inner, dim=0)
    return inner / length * len(basis) ** 0.5


def _is_dense(delta: Tensor, limit: float, noise: float) -> bool:
    """Whether rows show a rank above the limit: in what is left of half without the other half.

    Rows that are spread over r directions alike are at right angles to each other up to 1 / r; the
    rank is never below that number. What rounding may have made is no evidence.
    """
    first, rest = delta[::2], delta[1::2]
    if _spread(rest) > MARGIN * limit:
        return True
    basis = torch.linalg.qr(first.T).Q
    left = rest - (rest @ basis) @ basis.T
    beyond = float(left.square().sum()) > 2 * noise**2 * len(rest) / len(delta)
    return beyond and _spread(left) > MARGIN * limit


def _spread(rows: Tensor) -> float:
    """An estimate of the participation ratio, tr(C)² / tr(C²), of the rows' covariance C."""
    gram = rows @ rows.T
    own = gram.diagonal()
    pairs = len(rows) * (len(rows) - 1)
    apart = (float(gram.square().sum()) - float(own.square().sum())) / pairs
    return float(own.mean()) ** 2 / apart if apart > 0 else math.inf
