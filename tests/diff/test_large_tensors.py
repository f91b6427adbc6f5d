"""Tensors that a sample of rows stands for: what it cannot have seen is not missed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import peftsurgery as ps
from peftsurgery.diff.tensor_change import Change, measure_change
from peftsurgery.diff.tensor_pair import SMALL
from peftsurgery.diff.weights import compare_weights
from peftsurgery.fingerprint import in_file

ROWS, COLUMNS = 1500, 400
UNSEEN = 7  # a row between those of the sample
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    made = 0.1 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    assert made.numel() > SMALL
    return made.to(dtype)


def changed(update: Tensor, dtype: torch.dtype = torch.float32) -> Change:
    one = weight(dtype)
    return measure_change(one, (one.float() + update).to(dtype))


def factors(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.randn(n, rank, generator=generator) for n in (ROWS, COLUMNS))
    return left @ right.T / 100


def test_a_dense_change_is_measured_whole() -> None:
    one, update = weight(), 0.05 * torch.randn(ROWS, COLUMNS)
    found, a, b = measure_change(one, one + update), one.double(), (one + update).double()
    delta = (b - a).numpy()
    assert found.verdict == "dense"
    assert found.relative == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(a), rel=1e-5)
    assert found.largest == pytest.approx(np.abs(delta).max(), rel=1e-6)
    assert found.sign_flips == pytest.approx(
        float((a.sign() != b.sign()).double().mean()), abs=0.01
    )
    share = np.linalg.svd(delta, compute_uv=False)[0] ** 2 / (delta**2).sum()
    assert found.top_share is not None
    assert share / 3 < found.top_share <= share


def test_a_direction_that_stands_out_of_a_dense_change_has_its_share() -> None:
    update = 0.01 * torch.randn(ROWS, COLUMNS) + factors(1)
    values = np.linalg.svd(update.double().numpy(), compute_uv=False)
    found = changed(update)
    assert found.verdict == "dense"
    assert found.top_share == pytest.approx(values[0] ** 2 / (values**2).sum(), rel=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 16, 60, 90])
def test_a_folded_adapter_has_its_rank(rank: int, dtype: torch.dtype) -> None:
    found = changed(factors(rank), dtype)
    assert (found.verdict, found.rank) == ("low-rank", rank)


@pytest.mark.parametrize("rank", [110, 200])
def test_a_rank_over_the_limit_is_dense(rank: int) -> None:
    assert changed(factors(rank)).verdict == "dense"


def test_singular_values_that_fall_off_are_not_taken_for_few() -> None:
    left, right = (torch.linalg.qr(torch.randn(n, COLUMNS)).Q for n in (ROWS, COLUMNS))
    update = left @ torch.diag(torch.arange(1, COLUMNS + 1.0) ** -0.5) @ right.T
    assert changed(update).verdict == "dense"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_change_of_rows_that_the_sample_has_not_is_found(dtype: torch.dtype) -> None:
    update = torch.zeros(ROWS, COLUMNS)
    update[UNSEEN : UNSEEN + 2] = torch.randn(2, COLUMNS)
    found = changed(update, dtype)
    assert (found.verdict, found.rank) == ("low-rank", 2)
    assert found.largest == pytest.approx(float(update.abs().max()), rel=0.02)


def test_directions_that_the_sample_has_not_are_added_to_those_it_has() -> None:
    update = factors(4)
    update[UNSEEN] += torch.randn(COLUMNS)
    found = changed(update)
    assert (found.verdict, found.rank) == ("low-rank", 5)


def test_one_number_elsewhere_is_no_rounding_and_not_identical() -> None:
    one = weight()
    cast = one.bfloat16()
    assert measure_change(one, cast).verdict == "rounding"
    cast[UNSEEN, 3] += 1
    assert measure_change(one, cast).verdict != "rounding"
    for place in (one.clone(), one.double()):
        assert measure_change(one, place).verdict == "identical"
        place[UNSEEN, 3] += 1
        assert (found := measure_change(one, place)).verdict == "low-rank"
        assert (found.rank, found.ulps > 1) == (1, True)


@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (ROWS * COLUMNS,), (60, 10_000), (50, 80, 150)])
def test_nan_is_seen_wherever_it_is(shape: tuple[int, ...]) -> None:
    one = weight().reshape(shape)
    broken = one.clone()
    broken.view(-1)[UNSEEN * COLUMNS + 3] = float("nan")
    found = measure_change(one, broken)
    assert (found.verdict, found.not_finite) == ("not finite", (0, 1))


def test_numbers_whose_squares_are_too_large_are_measured() -> None:
    one = weight() * 1e25
    found = measure_change(one, one * 1.5)
    assert found.relative == pytest.approx(0.5, rel=1e-5)
    assert found.not_finite == (0, 0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int64, torch.float8_e4m3fn])
def test_files_are_measured_as_memory_is(tmp_path: Path, dtype: torch.dtype) -> None:
    one = (weight() * 100).to(dtype)
    other = (weight() * 100 + factors(3) * 100).to(dtype)
    rest = {"odd": torch.ones(3, dtype=torch.bool), "none": torch.ones(0, 4)}
    for name, tensor in (("a", one), ("b", other)):
        save_file({"w": tensor, **rest}, tmp_path / f"{name}.safetensors")
    sides = [in_file(tmp_path / f"{name}.safetensors") for name in "ab"]
    found = {each.before: each.change for each in compare_weights(*sides, {})}
    assert found["w"] == measure_change(one, other)
    assert found["odd"] == found["none"] == Change("identical")


def test_threads_are_as_many_as_before(tmp_path: Path) -> None:
    save_file({f"w{n}": torch.randn(8, 8) for n in range(5)}, tmp_path / "a.safetensors")
    before = torch.get_num_threads()
    side = in_file(tmp_path / "a.safetensors")
    assert all(each.change == Change("identical") for each in compare_weights(side, side, {}))
    assert torch.get_num_threads() == before


def test_a_file_that_becomes_shorter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": weight()}, path)
    side = in_file(path)
    with path.open("rb+") as stream:
        stream.truncate(path.stat().st_size // 2)
    with pytest.raises(ps.SurgeryError) as refused:
        compare_weights(side, side, {})
    assert refused.value.code == "PSG207"
