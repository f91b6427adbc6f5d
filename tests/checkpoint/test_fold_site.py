"""Rows of fused weights, of replaced ones and of whole ones: folded block by block as at once."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from peftsurgery.checkpoint.fold_site import BLOCK, fold_site
from peftsurgery.checkpoint.fold_tensor import Folding, FoldMeasure
from peftsurgery.checkpoint.plan import FoldPlan, Planned, SiteFold
from peftsurgery.checkpoint.streaming import fold_files
from peftsurgery.language.expression import parse
from peftsurgery.model_files import read_model_files
from peftsurgery.tensor_file import read_header

COLUMNS, RANK = 5, 2


def site_of(part: tuple[int, int, int, int] | None, turned: bool = False) -> SiteFold:
    return SiteFold(
        adapter="lora",
        module="fused",
        weights={"W": "fused.weight", "b": "fused.bias"},
        parameters={"A": "A", "B": "B", "c": "c"},
        numbers={},
        fold={"W": parse("W + B @ A"), "b": parse("b + c")},
        let={},
        turned=frozenset({"W"} if turned else ()),
        slice=part,
        rows={"B": 0, "c": 0},
    )


@st.composite
def parts(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Some rows of each period: of the query in (query, key, value), for each head or for all."""
    period, groups = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    start = draw(st.integers(0, period - 1))
    return start, draw(st.integers(1, period - start)), period, groups


@given(parts(), st.integers(1, 20), st.booleans())
def test_blocks_of_a_fused_weight_are_folded_as_numpy_adds_to_its_rows(
    part: tuple[int, int, int, int], step: int, is_turned: bool
) -> None:
    start, length, period, groups = part
    draw = np.random.default_rng(0)
    W, b = draw.standard_normal((period * groups, COLUMNS)), draw.standard_normal(period * groups)
    mine = [group * period + start + k for group in range(groups) for k in range(length)]
    learnt = {
        "A": draw.standard_normal((RANK, COLUMNS)),
        "B": draw.standard_normal((len(mine), RANK)),
        "c": draw.standard_normal(len(mine)),
    }
    meant, bias = W.copy(), b.copy()
    meant[mine] += learnt["B"] @ learnt["A"]
    bias[mine] += learnt["c"]
    count = len(W)
    blocks = (
        [None] if is_turned else [slice(k, min(k + step, count)) for k in range(0, count, step)]
    )
    found: dict[str, list[np.ndarray]] = {"fused.weight": [], "fused.bias": []}
    for rows in blocks:
        some = slice(None) if rows is None else rows
        now = {"fused.weight": W.T if is_turned else W[some], "fused.bias": b[some]}
        fold_site(site_of(part, is_turned), now, learnt, rows)
        for name, value in now.items():
            found[name].append(value)
    joined = {name: np.concatenate(values) for name, values in found.items()}
    weight = joined["fused.weight"].T if is_turned else joined["fused.weight"]
    np.testing.assert_allclose(weight, meant, 1e-12, 1e-12)
    np.testing.assert_allclose(joined["fused.bias"], bias, 1e-12, 1e-12)


@pytest.mark.parametrize("kind", ["fused", "replaced"])
def test_a_large_weight_takes_the_memory_of_a_few_rows(tmp_path: Path, kind: str) -> None:
    rows, columns, heads = 1536, 512, 8
    period, length = rows // heads, rows // heads // 3
    draw = np.random.default_rng(0)
    base = tmp_path / "base"
    base.mkdir()
    before = draw.standard_normal((rows, columns), np.float32).astype(ml_dtypes.bfloat16)
    bias = draw.standard_normal(rows, np.float32)
    save_file({"fused.weight": before, "fused.bias": bias}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({}))
    learnt = {
        "A": draw.standard_normal((RANK, columns), np.float32),
        "B": draw.standard_normal((rows // 3, RANK), np.float32),
        "c": draw.standard_normal(rows // 3, np.float32),
    }
    plan = FoldPlan((site_of((length, length, period, heads)),), record={"base": None})
    if kind == "replaced":
        learnt = {"new": draw.standard_normal((rows, columns), np.float32)}
        plan = FoldPlan((), replaced={"fused.weight": "new"}, record={"base": None})
    save_file(learnt, tmp_path / "adapter.safetensors")
    adapter = read_header(tmp_path / "adapter.safetensors")
    tensors = {name: (adapter, tensor) for name, tensor in adapter.tensors.items()}
    folding = Folding(plan, read_model_files(base).tensors, tensors)
    sizes = [len(block) // 2 for block in folding.blocks("fused.weight", "BF16", FoldMeasure())]
    assert sum(sizes) == rows * columns
    assert max(sizes) <= BLOCK

    fold_files(Planned(plan, base, adapter), tmp_path / "out")
    meant = before.astype(np.float64)
    if kind == "replaced":
        meant = learnt["new"].astype(np.float64)
    else:
        mine = meant.reshape(heads, 3, length, columns)
        change = learnt["B"].astype(np.float64) @ learnt["A"]
        mine[:, 1] += change.reshape(heads, length, columns)
    found = load_file(tmp_path / "out" / "model.safetensors")["fused.weight"]
    nearest = meant.astype(np.float32).astype(ml_dtypes.bfloat16)
    assert np.mean(found != nearest) < 1e-4  # where fp32's own rounding decides a tie
    np.testing.assert_allclose(found.astype(np.float64), meant, 2**-8, 1e-5)
