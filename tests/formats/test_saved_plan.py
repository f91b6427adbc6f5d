"""Saved surgeries are folded on files by what their manifests say: no model is captured for it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import peftsurgery as ps
from peftsurgery.errors import SurgeryError
from peftsurgery.formats import plan_process, streamed_fold
from peftsurgery.formats.saved_plan import saved_plan
from tests.mutations import changed_file, ended, with_change

LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, **HEADS)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32)),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(folder / name)
    return folder


@cache
def captured(base: Path) -> ps.GraphModel:
    """A base's directory, captured once."""
    return ps.capture(str(base))


def saved(base: Path, folder: Path, *rules: str, train: list[str] | None = None) -> Any:
    """A surgery on a base with values that change something; the operated model."""
    more = {} if train is None else {"train": train}
    model: Any = captured(base)
    for rule in rules:
        model = ps.apply(model, rule, **more)
    model.bind()
    with torch.no_grad():
        for value in model.learnt(*model.active).values():
            value.add_(torch.randn(value.shape) * 0.1)
    model.save(folder)
    return model


@pytest.fixture(scope="module")
def surgery(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A surgery whose manifest has a plan; not to be changed."""
    folder = tmp_path_factory.mktemp("surgery") / "surgery"
    saved(bases / "llama", folder, "lora_qv")
    return folder


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be captured for a plan."""
    monkeypatch.setitem(sys.modules, "peftsurgery.formats.captured_plan", None)
    monkeypatch.setattr(plan_process, "planned_apart", lambda *_: pytest.fail("a process"))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("base", "rules", "train"),
    [
        ("llama", ["lora_qv"], None),
        ("llama", ["ia3"], None),
        ("llama", ["dora", "lora_all_linear"], None),
        ("llama", ["lora_qv"], ["norm"]),
        ("gpt2", ["lora_attention"], None),  # turned, and parts of one fused weight
        ("gpt2", ["ia3"], None),
    ],
)
def test_what_the_manifest_says_is_what_the_model_folds(
    bases: Path, tmp_path: Path, base: str, rules: list[str], train: list[str] | None
) -> None:
    model = saved(bases / base, tmp_path / "surgery", *rules, train=train)
    report = ps.fold_checkpoint(tmp_path / "surgery", None, tmp_path / "out")
    wanted = dict(ps.fold(model).state_dict())
    after, before = (load_file(f / "model.safetensors") for f in (tmp_path / "out", bases / base))
    prefix = "" if after.keys() <= wanted.keys() else "transformer."
    assert {n for n, v in after.items() if not torch.equal(v, before[n])} == {*report.changed}
    for name, value in after.items():
        assert torch.allclose(value, wanted[prefix + name], atol=1e-6, rtol=1e-6), name
    told = json.loads((tmp_path / "out" / "peftsurgery.json").read_text())
    assert [entry["method"] for entry in told["folded"]] == [
        op.file.name for op in model.operations
    ]
    assert ps.verify(tmp_path / "out").changed == len(report.changed)


def test_the_record_and_the_bytes_are_those_of_a_captured_plan(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    saved(bases / "llama", tmp_path / "surgery", "lora_qv")
    assert saved_plan(tmp_path / "surgery", None) is not None
    ps.fold_checkpoint(tmp_path / "surgery", None, tmp_path / "one")
    monkeypatch.setattr(streamed_fold, "saved_plan", lambda *_: None)
    ps.fold_checkpoint(tmp_path / "surgery", None, tmp_path / "other")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes(), file.name


def test_the_process_that_folds_has_neither_torch_nor_the_schema(
    bases: Path, tmp_path: Path
) -> None:
    saved(bases / "llama", tmp_path / "surgery", "lora_qv")
    code = (
        "import sys; import peftsurgery as ps; ps.fold_checkpoint(*sys.argv[1:4]); "
        "print(sorted({'torch', 'transformers', 'pydantic'} & sys.modules.keys()))"
    )
    places = [str(tmp_path / "surgery"), str(bases / "llama"), str(tmp_path / "out")]
    command = [sys.executable, "-c", code, *places]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]"]


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a manifest says."""
    file = folder / "surgery.json"
    said = json.loads(file.read_text())
    change(said)
    file.write_text(json.dumps(said))


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said["operations"][0]["settings"].update(alpha=64),
        lambda said: said.pop("fold"),
        lambda said: said.update(fold=[]),
        lambda said: said["fold"].update(sites=3),
        lambda said: said["fold"]["sites"][0].pop("fold"),
        lambda said: said["fold"]["sites"][0].update(fold={"W": "W +"}),
    ],
)
def test_a_manifest_that_was_changed_since_leaves_the_plan_to_the_model(
    bases: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    saved(bases / "llama", tmp_path / "surgery", "lora_qv")
    changed(tmp_path / "surgery", change)
    assert saved_plan(tmp_path / "surgery", None) is None


def test_what_was_changed_since_is_folded_as_it_is_now(bases: Path, tmp_path: Path) -> None:
    saved(bases / "llama", tmp_path / "surgery", "lora_qv")
    changed(tmp_path / "surgery", lambda said: said["operations"][0]["settings"].update(alpha=64))
    ps.fold_checkpoint(tmp_path / "surgery", None, tmp_path / "out")
    wanted = dict(ps.fold(ps.load(tmp_path / "surgery")).state_dict())
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.allclose(value, wanted[name], atol=1e-6, rtol=1e-6), name


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_changed_files_leave_it_to_the_model_or_are_refused(
    bases: Path, surgery: Path, data: st.DataObject
) -> None:
    files = [surgery / name for name in ("surgery.json", "surgery.json", "adapter.safetensors")]
    file, content = data.draw(st.sampled_from(files).flatmap(changed_file))
    with with_change(surgery, file, content) as again:
        code = ended(lambda: saved_plan(again, str(bases / "llama")))
        assert code in ("", "PSG207", "PSG416", "PSG606")


def test_rules_that_were_changed_since_are_read_again(bases: Path, tmp_path: Path) -> None:
    saved(bases / "llama", tmp_path / "surgery", "lora_qv")
    (rules,) = (tmp_path / "surgery" / "rules").iterdir()
    rules.write_text(rules.read_text() + "\n# a remark\n")
    assert saved_plan(tmp_path / "surgery", None) is None


def test_another_base_is_refused_as_ever(bases: Path, tmp_path: Path) -> None:
    saved(bases / "llama", tmp_path / "surgery", "lora_qv")
    other = shutil.copytree(bases / "llama", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SurgeryError, match="PSG319"):
        ps.fold_checkpoint(tmp_path / "surgery", other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rule", ["prefix_tuning", "nf4"])
def test_what_cannot_be_folded_on_files_has_no_plan(bases: Path, tmp_path: Path, rule: str) -> None:
    model = ps.apply(captured(bases / "llama"), rule)
    model.save(tmp_path / "surgery")
    assert "fold" not in json.loads((tmp_path / "surgery" / "surgery.json").read_text())


def test_an_adapter_that_is_not_active_leaves_the_plan_open(bases: Path, tmp_path: Path) -> None:
    model = ps.apply(ps.apply(captured(bases / "llama"), "lora_qv"), "ia3")
    model.deactivate("ia3")
    model.save(tmp_path / "surgery")
    assert saved_plan(tmp_path / "surgery", None) is None
