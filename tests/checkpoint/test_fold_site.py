"""Rows of fused weights, of replaced ones and of whole ones: folded block by block as at once."""

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from peftsurgery.checkpoint.certificate import verify
from peftsurgery.checkpoint.fold_site import BLOCK, fold_site
from peftsurgery.checkpoint.fold_tensor import Folding, FoldMeasure
from peftsurgery.checkpoint.plan import FoldPlan, Planned, SiteFold
from peftsurgery.checkpoint.streaming import fold_files
from peftsurgery.checkpoint.unfolding import unfold_checkpoint
from peftsurgery.errors import SurgeryError
from peftsurgery.language.expression import parse
from peftsurgery.model_files import read_model_files
from peftsurgery.tensor_file import read_header

COLUMNS, RANK = 5, 2


def site_of(part: tuple[int, int, int, int] | None, turned: bool = False) -> SiteFold:
    """A LoRA; of a weight that is not turned, with a change of its bias."""
    names = ("W",) if turned else ("W", "b")
    fold = {"W": "W + B @ A", "b": "b + c"}
    return SiteFold(
        adapter="lora",
        module="fused",
        weights={"W": "fused.weight", "b": "fused.bias"},
        parameters={"A": "A", "B": "B"} | ({} if turned else {"c": "c"}),
        numbers={},
        fold={name: parse(fold[name]) for name in names},
        let={},
        turned=frozenset({"W"} if turned else ()),
        slice=part,
        rows={"B": 0, "c": 0},
        lines={"A": 1},
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
    stored, count = (W.T, COLUMNS) if is_turned else (W, len(W))
    site = site_of(part, is_turned)
    found: dict[str, list[np.ndarray]] = {name: [] for name in site.needed}
    for first in range(0, count, step):
        rows = slice(first, min(first + step, count))
        now = {"fused.weight": stored[rows], "fused.bias": b[rows]}
        now = {name: now[name] for name in site.needed}
        fold_site(site, now, learnt, rows)
        for name, value in now.items():
            found[name].append(value)
    joined = {name: np.concatenate(values) for name, values in found.items()}
    weight = joined["fused.weight"].T if is_turned else joined["fused.weight"]
    np.testing.assert_allclose(weight, meant, 1e-12, 1e-12)
    if not is_turned:
        np.testing.assert_allclose(joined["fused.bias"], bias, 1e-12, 1e-12)


@given(parts())
def test_a_weight_that_is_turned_is_folded_whole_as_numpy_adds_to_its_rows(
    part: tuple[int, int, int, int],
) -> None:
    start, length, period, groups = part
    draw = np.random.default_rng(0)
    W = draw.standard_normal((period * groups, COLUMNS))
    mine = [group * period + start + k for group in range(groups) for k in range(length)]
    learnt = {
        "A": draw.standard_normal((RANK, COLUMNS)),
        "B": draw.standard_normal((len(mine), RANK)),
    }
    now = {"fused.weight": W.T}
    fold_site(site_of(part, turned=True), now, learnt, None)
    meant = W.copy()
    meant[mine] += learnt["B"] @ learnt["A"]
    np.testing.assert_allclose(now["fused.weight"].T, meant, 1e-12, 1e-12)


def test_a_change_of_a_bias_that_is_not_there_is_refused_whatever_else_changes(
    tmp_path: Path,
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file({"fused.weight": np.ones((4, COLUMNS), np.float32)}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    learnt = {"A": np.ones((RANK, COLUMNS)), "B": np.ones((4, RANK)), "c": np.ones(4)}
    save_file({k: v.astype(np.float32) for k, v in learnt.items()}, tmp_path / "a.safetensors")
    both, adapter = site_of(None), read_header(tmp_path / "a.safetensors")
    here = {"W": "fused.weight"}
    weight = replace(
        both, weights=here, parameters={"A": "A", "B": "B"}, fold={"W": both.fold["W"]}
    )
    bias = replace(both, weights=here, parameters={"c": "c"}, fold={"b": both.fold["b"]})
    bias = replace(bias, absent=("b",))
    for sites in ((weight, bias), (bias, weight), (replace(both, weights=here, absent=("b",)),)):
        plan = FoldPlan(sites, record={"base": None})
        with pytest.raises(SurgeryError, match="PSG405"):
            fold_files(Planned(plan, base, adapter), tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["fused", "turned", "replaced"])
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
    if kind == "turned":
        del learnt["c"]
        learnt["B"] = np.tile(learnt["B"], (3, 1))
        before = np.ascontiguousarray(before.T)
        save_file({"fused.weight": before, "fused.bias": bias}, base / "model.safetensors")
        plan = FoldPlan((site_of(None, turned=True),), record={"base": None})
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
    elif kind == "turned":
        meant += (learnt["B"].astype(np.float64) @ learnt["A"]).T
    else:
        mine = meant.reshape(heads, 3, length, columns)
        change = learnt["B"].astype(np.float64) @ learnt["A"]
        mine[:, 1] += change.reshape(heads, length, columns)
    found = load_file(tmp_path / "out" / "model.safetensors")["fused.weight"]
    nearest = meant.astype(np.float32).astype(ml_dtypes.bfloat16)
    assert np.mean(found != nearest) < 1e-4  # where fp32's own rounding decides a tie
    np.testing.assert_allclose(found.astype(np.float64), meant, 2**-8, 1e-5)


@pytest.mark.parametrize("layout", ["stack", "turned stack", "pieces", "turned pieces"])
def test_experts_are_folded_a_few_lines_at_a_time(tmp_path: Path, layout: str) -> None:
    experts, out, columns, rank = 3, 600, 512, 2
    is_turned, draw = "turned" in layout, np.random.default_rng(0)
    W = draw.standard_normal((experts, out, columns), np.float32).astype(ml_dtypes.bfloat16)
    A = draw.standard_normal((experts, rank, columns), np.float32)
    B = draw.standard_normal((experts, out, rank), np.float32)
    stored = np.ascontiguousarray(W.swapaxes(1, 2)) if is_turned else W
    tensors, stacks = {"experts.weight": stored}, {}
    if "pieces" in layout:
        half = stored.shape[1] // 2
        places = [(e, *part) for e in range(experts) for part in ((0, half), (half, 2 * half))]
        stacks = {"experts.weight": tuple((f"{e}.{i}", e, i, j) for e, i, j in places)}
        tensors = {f"{e}.{i}": np.ascontiguousarray(stored[e, i:j]) for e, i, j in places}
    base = tmp_path / "base"
    base.mkdir()
    save_file(tensors, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    save_file({"A": A, "B": B}, tmp_path / "adapter.safetensors")
    site = SiteFold(
        adapter="lora",
        module="experts",
        weights={"W": "experts.weight"},
        parameters={"A": "A", "B": "B"},
        numbers={},
        fold={"W": parse("W + B @ A")},
        let={},
        turned=frozenset({"W"} if is_turned else ()),
        rows={"A": 0, "B": 0},
        lines={"A": 2} if is_turned else {"B": 1},
    )
    plan = FoldPlan((site,), record={"base": None}, stacks=stacks)
    adapter = read_header(tmp_path / "adapter.safetensors")
    own = {name: (adapter, tensor) for name, tensor in adapter.tensors.items()}
    folding = Folding(plan, read_model_files(base).tensors, own)
    for name, tensor in tensors.items():
        sizes = [len(block) // 2 for block in folding.blocks(name, "BF16", FoldMeasure())]
        assert sum(sizes) == tensor.size
        assert max(sizes) <= BLOCK
        assert len(list(folding.exact(name))) > 1 or tensor.size <= BLOCK

    fold_files(Planned(plan, base, adapter), tmp_path / "out")
    exact = W.astype(np.float64) + B.astype(np.float64) @ A
    meant = exact.swapaxes(1, 2) if is_turned else exact
    found = load_file(tmp_path / "out" / "model.safetensors")
    if "pieces" in layout:
        whole = [np.concatenate([found[f"{e}.{0}"], found[f"{e}.{half}"]]) for e in range(experts)]
        found = {"experts.weight": np.stack(whole)}
    nearest = meant.astype(np.float32).astype(ml_dtypes.bfloat16)
    assert np.mean(found["experts.weight"] != nearest) < 1e-4
    np.testing.assert_allclose(found["experts.weight"].astype(np.float64), meant, 2**-8, 1e-5)
    assert verify(tmp_path / "out").changed == len(tensors)
    assert unfold_checkpoint(tmp_path / "out", tmp_path / "back", base).changed == len(tensors)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(back[name].tobytes() == value.tobytes() for name, value in tensors.items())
