"""Best low-rank approximations of matrices that may be larger than memory, with measured errors.

A matrix is read as blocks of rows, several times over. Small ones are taken apart exactly; of
others the range is found at random (Halko, Martinsson and Tropp, 2011, arXiv:0909.4061, algorithms
4.4 and 5.1), in a subspace that grows until it holds what was asked for. Either way the error is
measured on the matrix itself, with the factors as they are returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from peftsurgery.checkpoint.arrays import Array
from peftsurgery.errors import SurgeryError

Blocks = Callable[[], Iterator[Array]]

EXACT = 512  # smaller sides are taken apart exactly
SPARE = 12  # directions beyond those that are kept, which make the kept ones accurate
ROUNDS = 3  # of reading the matrix to turn the subspace towards its largest directions
# Singular values that are smaller, as shares of the largest, are rounding, and need no rank.
PRECISION = 1e-6


@dataclass(frozen=True)
class Factors:
    """A matrix as ``left @ right``, (rows, rank) and (rank, columns) in fp32.

    ``norm`` is the matrix's Frobenius norm, ``error`` that of what the product lacks of it.
    """

    left: Array
    right: Array
    norm: float
    error: float

    @property
    def rank(self) -> int:
        """Columns of ``left``."""
        return int(self.left.shape[1])

    @property
    def approximation(self) -> Approximation:
        """What they keep of the matrix, which is not zero."""
        return Approximation(self.rank, self.norm, self.error / self.norm)


@dataclass(frozen=True)
class Approximation:
    """What factors keep of a matrix: their rank, its Frobenius norm, and the share that is lost."""

    rank: int
    norm: float
    lost: float


def share_lost(made: Iterable[Approximation], left_out: Iterable[float] = ()) -> float:
    """The share that is lost of all of these together, and of what has the norms ``left_out``."""
    found, others = list(made), list(left_out)
    whole = math.hypot(*(each.norm for each in found), *others)
    return math.hypot(*(each.lost * each.norm for each in found), *others) / whole if whole else 0.0


@dataclass(frozen=True)
class Wanted:
    """How much of a matrix is kept: ``rank`` directions, or the share ``energy`` of its square.

    Without either, all directions above ``PRECISION`` of the largest. Directions below ``noise``
    (a singular value) are never kept.
    """

    rank: int | None = None
    energy: float | None = None
    noise: float = 0.0

    def count(self, values: Array, square: float) -> int:
        """How many of these singular values, largest first, are kept."""
        floor = max(PRECISION * float(values[0]), self.noise) if len(values) else 0.0
        needed = int((values > floor).sum())
        if self.rank is not None:
            return min(self.rank, needed)
        if self.energy is None:
            return needed
        kept = np.cumsum(np.square(values, dtype=np.float64))
        enough = int(np.searchsorted(kept, self.energy * square * (1 - 1e-12))) + 1
        return min(enough, needed)


def checked_wish(rank: int | None, energy: float | None, noise: float = 0.0) -> Wanted:
    """The wish for a rank, a share of the energy or neither. PSG317 for values that are none."""
    if rank is not None and energy is not None:
        raise SurgeryError("PSG317", "rank and energy are given, and each decides the rank")
    if rank is not None and (isinstance(rank, bool) or rank < 1):
        raise SurgeryError("PSG317", f"a rank is a whole number of at least 1, not {rank!r:.60}")
    if energy is not None and not 0 < energy <= 1:
        what = "an energy is a share of the squared norm, above 0 and at most 1"
        raise SurgeryError("PSG317", f"{what}, not {energy!r:.60}")
    return Wanted(rank, energy, noise)


def factors_of(blocks: Blocks, columns: int, wanted: Wanted) -> Factors:
    """Factors of the matrix whose rows are ``blocks()``, one after the other.

    The best ones of their rank where the smaller side has at most EXACT numbers; else within a few
    per mille of it. Values must be finite.
    """
    rows, square = 0, 0.0
    for block in blocks():
        rows += len(block)
        square += _square(block)
    if not square:
        return Factors(
            np.zeros((rows, 0), np.float32), np.zeros((0, columns), np.float32), 0.0, 0.0
        )
    left, values, right = _decomposed(blocks, rows, columns, wanted, square)
    kept = wanted.count(values, square)
    root = np.sqrt(values[:kept])
    halves = (
        (left[:, :kept] * root).astype(np.float32),
        (root[:, None] * right[:kept]).astype(np.float32),
    )
    return Factors(*halves, math.sqrt(square), _error(blocks, *halves))


def rows_in_blocks(matrix: Array, size: int = 2**22) -> Blocks:
    """A matrix in memory as blocks of about ``size`` elements."""
    step = max(1, size // max(matrix.shape[1], 1))
    return lambda: (matrix[start : start + step] for start in range(0, len(matrix), step))


def _decomposed(
    blocks: Blocks, rows: int, columns: int, wanted: Wanted, square: float
) -> tuple[Array, Array, Array]:
    """Singular vectors and values, as many as are needed or more."""
    side = min(rows, columns)
    width = (wanted.rank or 2 * SPARE) + SPARE
    while side > EXACT and 3 * width < side:
        left, values, right = _in_subspace(blocks, rows, columns, width)
        if wanted.rank is not None or wanted.count(values, square) <= width - SPARE:
            return left, values, right
        width *= 2
    whole = np.concatenate(list(blocks()))
    left, values, right = np.linalg.svd(whole, full_matrices=False)
    return left, values, right


def _in_subspace(blocks: Blocks, rows: int, columns: int, width: int) -> tuple[Array, Array, Array]:
    """Singular vectors and values within a subspace of ``width`` directions found at random."""
    generator = np.random.default_rng(0)
    basis: Array = generator.standard_normal((columns, width))
    for _ in range(ROUNDS):
        range_of, _ = np.linalg.qr(_times(blocks, rows, basis))
        basis, upper = np.linalg.qr(_turned_times(blocks, columns, range_of))
    # the matrix in the subspace is range_of @ (basis @ upper).T
    inner, values, outer = np.linalg.svd(upper.T)
    return range_of @ inner, values, outer @ basis.T


def _times(blocks: Blocks, rows: int, other: Array) -> Array:
    """The matrix times ``other``."""
    made, start = np.empty((rows, other.shape[1])), 0
    for block in blocks():
        made[start : start + len(block)] = block @ other.astype(block.dtype, copy=False)
        start += len(block)
    return made


def _turned_times(blocks: Blocks, columns: int, other: Array) -> Array:
    """The transposed matrix times ``other``."""
    made, start = np.zeros((columns, other.shape[1])), 0
    for block in blocks():
        made += block.T @ other[start : start + len(block)].astype(block.dtype, copy=False)
        start += len(block)
    return made


def _error(blocks: Blocks, left: Array, right: Array) -> float:
    """Norm of what ``left @ right`` lacks of the matrix."""
    square, start = 0.0, 0
    for block in blocks():
        mine = left[start : start + len(block)].astype(block.dtype, copy=False)
        square += _square(block - mine @ right.astype(block.dtype, copy=False))
        start += len(block)
    return math.sqrt(square)


def _square(block: Array) -> float:
    """Sum of squares, added in fp64."""
    return float(np.sum(np.square(block, dtype=np.float64)))
