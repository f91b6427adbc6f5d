"""Merges of adapters on files, against what peft adds to the weights by each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import peftsurgery as ps
from tests.checkpoint.loras import changes, llama, saved_lora


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters that share some modules, of other ranks and scales, one of them rsLoRA."""
    folder = tmp_path_factory.mktemp("loras")
    one = saved_lora(folder / "one", rank_pattern={"layers.1.self_attn.q_proj": 5})
    other = saved_lora(
        folder / "other",
        seed=2,
        r=2,
        use_rslora=True,
        target_modules=["v_proj", "down_proj", "embed_tokens"],
        alpha_pattern={"down_proj": 11},
    )
    return one, other


def close(found: dict[str, Any], wanted: dict[str, Any], tolerance: float = 2e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() < tolerance * max(1, value.abs().max()), name


@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
def test_a_sum_changes_every_weight_by_the_sum(
    two: tuple[Path, Path], tmp_path: Path, how: str
) -> None:
    report = ps.merge_adapters({two[0]: 0.7, two[1]: -0.3}, tmp_path / "out", how)
    one, other = changes(two[0]), changes(two[1])
    zero = torch.zeros(())
    wanted = {name: 0.7 * one.get(name, zero) - 0.3 * other.get(name, zero) for name in one | other}
    close(changes(tmp_path / "out"), wanted)
    assert report.lost == 0
    assert report.ranks["model.layers.0.self_attn.v_proj"] == 3 + 2
    assert report.ranks["model.layers.1.self_attn.q_proj"] == 5


def test_a_smaller_rank_is_the_best_of_its_rank(two: tuple[Path, Path], tmp_path: Path) -> None:
    report = ps.merge_adapters({two[0]: 1, two[1]: 1}, tmp_path / "out", "svd", rank=2)
    one, other, made = (changes(folder) for folder in (*two, tmp_path / "out"))
    missing = whole = 0.0
    for name, change in made.items():
        wanted = sum(part[name].double() for part in (one, other) if name in part)
        values = np.linalg.svd(np.asarray(wanted), compute_uv=False)
        gap = float((change - wanted).norm())
        assert gap == pytest.approx(np.sqrt(np.sum(values[2:] ** 2)), rel=1e-3, abs=1e-5)
        missing, whole = missing + gap**2, whole + np.sum(values**2)
    assert report.lost == pytest.approx(np.sqrt(missing / whole), rel=1e-3)
    assert set(report.ranks.values()) == {2}


@pytest.mark.parametrize("how", ["ties", "magnitude_prune"])
def test_merges_are_those_of_peft(tmp_path: Path, how: str) -> None:
    one, other = saved_lora(tmp_path / "one"), saved_lora(tmp_path / "two", seed=2, lora_alpha=7)
    ps.merge_adapters({one: 0.7, other: 0.4}, tmp_path / "out", how, density=0.6)
    model = PeftModel.from_pretrained(llama(), str(one), adapter_name="one")
    model.load_adapter(str(other), adapter_name="two")
    model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "both", how, density=0.6)
    model.set_adapter("both")
    before = llama().state_dict()
    after = model.merge_and_unload(adapter_names=["both"]).state_dict()
    wanted = {n: after[n] - v for n, v in before.items() if (after[n] - v).any()}
    close(changes(tmp_path / "out"), wanted)


def test_dare_keeps_the_mean_and_draws_by_its_seed(tmp_path: Path) -> None:
    one = saved_lora(tmp_path / "one", r=8, target_modules=["down_proj"])
    other = saved_lora(tmp_path / "two", r=8, target_modules=["down_proj"], seed=2)
    found = []
    for seed in (0, 0, 1):
        out = tmp_path / f"out{len(found)}"
        ps.merge_adapters({one: 1, other: 1}, out, "dare_linear", density=0.5, seed=seed)
        found.append(load_file(out / "adapter_model.safetensors"))
    name = next(name for name in found[0] if name.endswith("lora_A.weight"))
    assert torch.equal(found[0][name], found[1][name])
    assert not torch.equal(found[0][name], found[2][name])
    share = (found[0][name] == 0).float().mean()  # both are dropped in a quarter
    assert 0.1 < share < 0.4


@pytest.mark.parametrize("config", [{"use_rslora": True}, {"use_dora": True}, {"bias": "all"}])
def test_one_adapter_alone_is_itself_whatever_it_is(tmp_path: Path, config: dict[str, Any]) -> None:
    base = llama(attention_bias=True)
    folder = saved_lora(tmp_path / "one", base=base, **config)
    ps.merge_adapters({str(folder): 1}, tmp_path / "out")
    close(
        changes(tmp_path / "out", llama(attention_bias=True)),
        changes(folder, llama(attention_bias=True)),
        tolerance=0.0 + 1e-12,
    )
    config_file = "adapter_config.json"
    assert (tmp_path / "out" / config_file).read_bytes() == (folder / config_file).read_bytes()


@pytest.mark.parametrize(
    ("weights", "settings", "code"),
    [
        ((float("nan"), 1), {}, "PSG317"),
        ((float("inf"), 1), {}, "PSG317"),
        ((True, 1), {}, "PSG317"),
        ((0, 0.0), {}, "PSG317"),
        ((1, 1), {"how": "sum"}, "PSG317"),
        ((1, 1), {"how": "ties"}, "PSG317"),
        ((1, 1), {"how": "ties", "density": 0}, "PSG317"),
        ((1, 1), {"how": "linear", "density": 0.5}, "PSG317"),
        ((1, 1), {"how": "cat", "rank": 2}, "PSG317"),
        ((1, 1), {"how": "svd", "rank": 0}, "PSG317"),
        ((1, 1), {"how": "ties", "density": 0.5}, "PSG315"),  # other ranks
        ((1e39, 1), {}, "PSG403"),
    ],
)
def test_what_makes_no_sense_is_refused_and_leaves_nothing(
    two: tuple[Path, Path],
    tmp_path: Path,
    weights: tuple[float, float],
    settings: dict[str, Any],
    code: str,
) -> None:
    with pytest.raises(ps.SurgeryError, match=code):
        ps.merge_adapters(dict(zip(two, weights, strict=True)), tmp_path / "out", **settings)
    assert list(tmp_path.iterdir()) == []


def test_adapters_of_other_bases_are_refused_unless_the_base_is_named(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    other = saved_lora(tmp_path / "other", seed=3)
    config = json.loads((other / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "another/base"
    (other / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ps.SurgeryError, match=r"PSG315.*another/base"):
        ps.merge_adapters({two[0]: 1, other: 1}, tmp_path / "out")
    llama().save_pretrained(tmp_path / "base")
    ps.merge_adapters({two[0]: 1, other: 1}, tmp_path / "out", base=tmp_path / "base")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tmp_path / "base")
    llama(hidden_size=32).save_pretrained(tmp_path / "wide")
    with pytest.raises(ps.SurgeryError, match="PSG507"):
        ps.merge_adapters({two[0]: 1, other: 1}, tmp_path / "out2", base=tmp_path / "wide")
    llama(num_hidden_layers=1).save_pretrained(tmp_path / "short")
    with pytest.raises(ps.SurgeryError, match="PSG506"):
        ps.merge_adapters({two[0]: 1, other: 1}, tmp_path / "out2", base=tmp_path / "short")
    with pytest.raises(ps.SurgeryError, match="PSG602"):
        ps.merge_adapters({two[0]: 1, other: 1}, tmp_path / "base", base=tmp_path / "base")
    with pytest.raises(ps.SurgeryError, match="PSG602"):
        ps.merge_adapters({two[0]: 1, two[1]: 1}, two[0], force=True)


def damaged(folder: Path, how: str) -> str:
    """An adapter made wrong in one way, and the code that says so."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    config = json.loads((folder / "adapter_config.json").read_text())
    code = {"pair": "PSG507", "nan": "PSG505", "rank": "PSG507", "alpha": "PSG503"}.get(how)
    if how == "pair":
        del tensors[name]
    elif how == "nan":
        tensors[name][0, 0] = torch.nan
    elif how == "rank":
        config["r"] += 1
    elif how == "alpha":
        config["lora_alpha"] = "8"
    elif how == "foreign":
        tensors = {key.removeprefix("base_model."): value for key, value in tensors.items()}
        code = "PSG506"
    elif how == "dora":
        config["use_dora"], code = True, "PSG520"
    elif how == "unknown":
        config["use_something_new"], code = {"a": 1}, "PSG520"
    save_file(tensors, file)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert code is not None
    return code


@pytest.mark.parametrize("how", ["pair", "nan", "rank", "alpha", "foreign", "dora", "unknown"])
def test_a_damaged_adapter_or_one_that_is_more_is_refused(
    two: tuple[Path, Path], tmp_path: Path, how: str
) -> None:
    folder = saved_lora(tmp_path / "bad", seed=4)
    code = damaged(folder, how)
    with pytest.raises(ps.SurgeryError, match=code):
        ps.merge_adapters({two[0]: 1, folder: 0.5}, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]
