"""Saved surgeries: what was learnt comes back, and nothing that is damaged or foreign is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftsurgery as ps
from peftsurgery.surgery import OperatedModel
from tests.models.captured import captured
from tests.models.zoo import ZOO
from tests.surgery.reference import randomise


@pytest.fixture
def operated() -> OperatedModel:
    first = ps.apply(captured("bert"), "lora_qv", rank=3, alpha=9)
    rule = ps.Rule(
        match="parameter", where={"kind": "bias", "path": r"classifier\.bias"}, train=True
    )
    return randomise(ps.apply(first, rule, name="head"))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**ZOO["bert"].inputs(2, 6)).logits


def test_a_saved_surgery_reloads_exactly(operated: OperatedModel, tmp_path: Path) -> None:
    operated.save(tmp_path / "op")
    again = ps.load(tmp_path / "op", base=captured("bert"))
    assert torch.equal(logits(again), logits(operated))
    assert [op.settings for op in again.operations] == [op.settings for op in operated.operations]
    assert {n for n, p in again.named_parameters() if p.requires_grad} == set(operated.learnt())


def test_only_what_was_learnt_is_saved_and_nothing_is_pickled(
    operated: OperatedModel, tmp_path: Path
) -> None:
    operated.save(tmp_path / "op")
    files = sorted(str(p.relative_to(tmp_path / "op")) for p in (tmp_path / "op").rglob("*.*"))
    rules = ["rules/0_lora_qv.yaml", "rules/1_custom.yaml"]
    assert files == ["adapter.safetensors", *rules, "surgery.json"]
    assert set(load_file(tmp_path / "op/adapter.safetensors")) == set(operated.learnt())


def test_saving_again_replaces_a_surgery_but_nothing_else(
    operated: OperatedModel, tmp_path: Path
) -> None:
    operated.save(tmp_path / "op")
    randomise(operated, seed=9).save(tmp_path / "op")
    assert torch.equal(logits(ps.load(tmp_path / "op", captured("bert"))), logits(operated))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(ps.SurgeryError, match="PSG604"):
        operated.save(tmp_path / "mine")


def test_a_surgery_on_a_directory_finds_its_base_again(tmp_path: Path) -> None:
    ZOO["bert"].build().save_pretrained(tmp_path / "bert")
    operated = ps.apply(ps.capture(str(tmp_path / "bert")), "lora_qv")
    assert all(p.is_meta for n, p in operated.named_parameters() if "lora_qv" not in n)
    assert not any(value.is_meta for value in operated.learnt().values())
    randomise(operated).save(tmp_path / "op")
    again = ps.load(tmp_path / "op")
    assert torch.equal(logits(again), logits(operated))
    assert not torch.equal(logits(again), logits(ZOO["bert"].build()))


TRAINED_OF_THE_BASE: dict[str, dict[str, list[str]]] = {
    "lora_qv": {"train": ["classifier"]},
    "bitfit": {},
    "p_tuning_v2": {},
}


@pytest.mark.parametrize("rule", TRAINED_OF_THE_BASE)
def test_what_is_trained_of_a_base_in_a_directory_comes_back(rule: str, tmp_path: Path) -> None:
    ZOO["bert"].build().save_pretrained(tmp_path / "base")

    def fresh() -> OperatedModel:
        graph = ps.capture(str(tmp_path / "base"))
        return ps.apply(graph, rule, **TRAINED_OF_THE_BASE[rule]).eval()

    untouched = fresh()
    untouched.save(tmp_path / "untouched")  # before the base was read for anything else
    trained = randomise(fresh(), scale=0.3)
    expected = logits(trained)
    assert (logits(untouched) - expected).abs().max() > 0.1
    trained.save(tmp_path / "op")
    assert torch.equal(logits(ps.load(tmp_path / "op").eval()), expected)
    assert torch.equal(
        logits(ps.apply(ps.load(tmp_path / "op"), "ia3", name="more").eval()), expected
    )
    assert torch.equal(logits(ps.load(tmp_path / "untouched").eval()), logits(untouched))
    given = fresh()
    given.load_state_dict(trained.state_dict())
    assert torch.equal(logits(given), expected)
    base, state = load_file(tmp_path / "base/model.safetensors"), fresh().state_dict()
    assert all(torch.equal(state[name], base[name]) for name in base.keys() & state.keys())
    assert base.keys() & state.keys()


def test_running_statistics_that_training_moved_come_back(tmp_path: Path) -> None:
    graph, images = captured("resnet"), ZOO["resnet"].inputs(3, 6)
    trained = ps.apply(graph, "lora_conv").train()
    for _ in range(2):
        trained(**images)
    trained.eval().save(tmp_path / "op")
    again = ps.load(tmp_path / "op", base=graph).eval()
    with torch.no_grad():
        expected = trained(**images)[0]
        assert torch.equal(again(**images)[0], expected)
        assert not torch.equal(ps.apply(graph, "lora_conv").eval()(**images)[0], expected)
        torch.testing.assert_close(ps.fold(again)(**images)[0], expected, rtol=0, atol=1e-5)
    fresh = ps.apply(graph, "lora_conv")
    fresh.save(tmp_path / "fresh")
    assert set(load_file(tmp_path / "fresh/adapter.safetensors")) == set(fresh.learnt())


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    tensors.popitem()
    save_file(tensors, folder / "adapter.safetensors")


def add_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    save_file({**tensors, "extra": torch.ones(1)}, folder / "adapter.safetensors")


def reshape_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    name = next(name for name in tensors if name.endswith(".A"))
    save_file({**tensors, name: torch.ones(5, 32)}, folder / "adapter.safetensors")


def poison(folder: Path) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("inf")
    save_file(tensors, folder / "adapter.safetensors")


def truncate(folder: Path) -> None:
    data = (folder / "adapter.safetensors").read_bytes()
    (folder / "adapter.safetensors").write_bytes(data[: len(data) // 2])


def escape(folder: Path) -> None:
    manifest = json.loads((folder / "surgery.json").read_text())
    manifest["operations"][0]["rules"] = "../../etc/passwd"
    (folder / "surgery.json").write_text(json.dumps(manifest))


def garble(folder: Path) -> None:
    (folder / "surgery.json").write_text("{")


def empty(folder: Path) -> None:
    (folder / "surgery.json").write_text('{"format": 1}')


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (drop_a_tensor, "PSG311"),
        (add_a_tensor, "PSG311"),
        (reshape_a_tensor, "PSG308"),
        (poison, "PSG606"),
        (truncate, "PSG606"),
        (escape, "PSG605"),
        (garble, "PSG605"),
        (empty, "PSG605"),
    ],
)
def test_damage_is_named(
    operated: OperatedModel, tmp_path: Path, damage: Callable[[Path], None], code: str
) -> None:
    operated.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ps.SurgeryError) as caught:
        ps.load(tmp_path, base=captured("bert"))
    assert caught.value.code == code


def test_a_surgery_for_another_model_is_refused(operated: OperatedModel, tmp_path: Path) -> None:
    operated.save(tmp_path)
    with pytest.raises(ps.SurgeryError):
        ps.load(tmp_path, base=captured("llama"))
