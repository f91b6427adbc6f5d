"""Low-rank factors of matrices in blocks, against numpy's own decomposition."""

from __future__ import annotations

import numpy as np
import pytest

from peftsurgery.checkpoint import low_rank
from peftsurgery.checkpoint.low_rank import Wanted, factors_of, rows_in_blocks


@pytest.fixture(scope="module")
def matrix() -> np.ndarray:
    """A matrix whose singular values fall slowly."""
    generator = np.random.default_rng(3)
    left, _ = np.linalg.qr(generator.standard_normal((640, 600)))
    right, _ = np.linalg.qr(generator.standard_normal((600, 600)))
    return (left * 0.97 ** np.arange(600)) @ right


@pytest.mark.parametrize("wanted", [Wanted(rank=20), Wanted(energy=0.5), Wanted(energy=0.99)])
def test_random_directions_lose_hardly_more_than_the_best(
    matrix: np.ndarray, wanted: Wanted
) -> None:
    made = factors_of(rows_in_blocks(matrix, 4096), 600, wanted)
    values = np.linalg.svd(matrix, compute_uv=False)
    best = np.sqrt(np.sum(values[made.rank :] ** 2))
    gap = np.linalg.norm(matrix - made.left.astype(float) @ made.right)
    assert made.error == pytest.approx(gap, rel=1e-6)
    assert gap <= 1.01 * best
    if wanted.energy is not None:
        needed = int(np.argmax(np.cumsum(values**2) >= wanted.energy * np.sum(values**2))) + 1
        assert needed <= made.rank <= needed + 1
        assert made.norm**2 - made.error**2 >= (wanted.energy - 1e-6) * made.norm**2


def test_a_matrix_of_low_rank_is_found_exactly_without_taking_it_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = np.random.default_rng(0)
    matrix = generator.standard_normal((700, 5)) @ generator.standard_normal((5, 900))
    svd = low_rank.np.linalg.svd

    def small(value: np.ndarray, **how: bool) -> object:
        assert min(value.shape) < 100
        return svd(value, **how)

    monkeypatch.setattr(low_rank.np.linalg, "svd", small)
    made = factors_of(rows_in_blocks(matrix, 5000), 900, Wanted())
    assert made.rank == 5
    assert made.error < 1e-6 * made.norm


def test_a_zero_matrix_has_no_rank_and_noise_is_left_out() -> None:
    zero = factors_of(rows_in_blocks(np.zeros((4, 6))), 6, Wanted(rank=3))
    assert (zero.rank, zero.error, zero.left.shape, zero.right.shape) == (0, 0.0, (4, 0), (0, 6))
    values = np.diag([3.0, 2.0, 1e-3])
    assert factors_of(rows_in_blocks(values), 3, Wanted(noise=1e-2)).rank == 2
