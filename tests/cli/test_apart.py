"""Nothing that a command reads is written by it, whatever it is told and however that is known."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import BertModel, Trainer, TrainingArguments

import peftsurgery as ps
from peftsurgery.language.shipped import shipped
from tests.cli.test_surgery import digest


@dataclass(frozen=True)
class Place:
    """A base, a surgery and peft's adapter on it, and a rule file."""

    base: Path
    surgery: Path
    adapter: Path
    rule: Path

    @property
    def root(self) -> Path:
        return self.base.parent

    def content(self) -> dict[str, str]:
        return digest(self.root)


@pytest.fixture(scope="module")
def made(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("apart")
    place = Place(*(root / name for name in ("base", "surgery", "adapter", "rule.yaml")))
    shutil.copytree(bert, place.base)
    shutil.copy(shipped()["lora_qv"], place.rule)
    ps.apply(ps.capture(str(place.base)), "lora_qv", rank=2).save(place.surgery)
    config = peft.LoraConfig(r=2, target_modules=["query"])
    wrapped = peft.get_peft_model(BertModel.from_pretrained(place.base), config)
    wrapped.save_pretrained(place.adapter)
    return place


COMMANDS: dict[str, Callable[[Place, Path], list[str | Path]]] = {
    "apply": lambda p, out: ["apply", p.base, p.rule, "-o", out],
    "apply to a surgery": lambda p, out: ["apply", p.surgery, "ia3", "-o", out],
    "fold": lambda p, out: ["fold", p.surgery, "-o", out],
    "fold with a base": lambda p, out: ["fold", p.surgery, "--base", p.base, "-o", out],
    "fold an adapter": lambda p, out: ["fold", p.adapter, "-o", out],
    "fold to onnx": lambda p, out: ["fold", p.surgery, "-o", p.root / "new", "--onnx", out],
    "fold to onnx by two dots": lambda p, out: [
        *("fold", p.surgery, "-o", p.root / "new", "--onnx"),
        p.root / "new" / ".." / os.path.relpath(out, p.root),
    ],
    "export to peft": lambda p, out: ["export", p.surgery, "--to", "peft", "-o", out],
    "export to adapterhub": lambda p, out: ["export", p.surgery, "--to", "adapterhub", "-o", out],
    "export to onnx": lambda p, out: ["export", p.surgery, "--to", "onnx", "-o", out],
}
READ = {
    "apply": ("base", "rule.yaml"),
    "apply to a surgery": ("base", "surgery"),
    "fold an adapter": ("base", "adapter"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_writes_into_or_over_what_it_reads(run: Any, made: Place, command: str) -> None:
    before = made.content()
    targets = [made.root]
    for name in READ.get(command, ("base", "surgery")):
        targets += [made.root / name, made.root / name / "inner", made.root / name / ".." / name]
    for target in targets:
        outcome = run(*COMMANDS[command](made, target), "--force", "--json")
        code = outcome.json["error"]["code"]
        assert outcome.code == 3
        # nothing lies inside of a file
        assert code == ("PSG603" if target == made.rule / "inner" else "PSG602"), target
        assert made.content() == before, target


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_a_rule_is_not_copied_over_itself(run: Any, made: Place, tmp_path: Path, link: str) -> None:
    before = made.content()
    other = tmp_path / "other.yaml"
    other.symlink_to(made.rule) if link == "symbolic" else os.link(made.rule, other)
    for target in (made.rule, made.base / ".." / "rule.yaml", other):
        outcome = run("rules", "cp", made.rule, target, "--force", "--json")
        assert outcome.json["error"]["code"] == "PSG602"
    assert made.content() == before
    outcome = run("rules", "cp", "lora_qv", shipped()["lora_qv"], "--force", "--json")
    assert outcome.json["error"]["code"] == "PSG602"
    assert run("rules", "cp", made.rule, tmp_path / "mine.yaml").code == 0


def test_what_appears_while_a_command_works_is_not_replaced(
    run: Any, made: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, save = tmp_path / "out", ps.OperatedModel.save

    def slow(self: Any, path: Any, names: Any = None) -> None:
        save(self, path, names)
        out.mkdir()
        (out / "surgery.json").write_text("another run's")

    monkeypatch.setattr(ps.OperatedModel, "save", slow)
    outcome = run("apply", made.base, "lora_qv", "-o", out, "--json")
    assert outcome.json["error"]["code"] == "PSG601"
    assert (out / "surgery.json").read_text() == "another run's"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_nothing_in_python_writes_where_its_model_was_read(made: Place) -> None:
    before = made.content()
    on_surgery = ps.load(made.surgery)
    on_adapter = ps.from_peft(ps.capture(str(made.base)), made.adapter)
    live = ps.apply(ps.capture(BertModel.from_pretrained(made.base)), "ia3")
    by_rule = ps.apply(ps.capture(str(made.base)), ps.load_rules(made.rule), rank=2)
    inner = made.base / "inner"
    for write in (
        lambda: ps.apply(on_surgery, "ia3").save(made.surgery, names=["ia3"]),
        lambda: on_surgery.save(made.base),
        lambda: live.save(inner),
        lambda: live.save_pretrained(made.base),
        lambda: ps.capture(str(made.base)).save_pretrained(inner),
        lambda: on_surgery.save_pretrained(made.surgery),
        lambda: on_adapter.save_pretrained(made.adapter / "inner"),
        lambda: Trainer(live, TrainingArguments(str(made.root / "new"))).save_model(str(made.base)),
        lambda: by_rule.save(inner),
        lambda: ps.to_peft(on_adapter, made.adapter),
        lambda: ps.to_peft(on_surgery, made.surgery / "inner"),
        lambda: ps.to_adapterhub(on_surgery, inner),
        lambda: ps.export_onnx(live, made.base / "model.safetensors"),
        lambda: ps.export_onnx(by_rule, made.rule),
        lambda: ps.fold_to_directory(made.surgery, inner),
        lambda: ps.fold_to_directory(made.surgery, made.surgery / "inner"),
        lambda: ps.fold_to_directory(made.adapter, inner),
        lambda: ps.fold_to_directory(
            made.surgery, made.root / "new", onnx=made.root / "new" / ".." / "base" / "m.onnx"
        ),
    ):
        with pytest.raises(ps.SurgeryError, match="PSG602"):
            write()
        assert made.content() == before


def test_a_base_is_known_by_what_names_it(run: Any, made: Place, tmp_path: Path) -> None:
    """Through a chain: an adapter that names a surgery that names the base, by a link."""
    link = tmp_path / "link"
    link.symlink_to(made.base)
    shutil.copytree(made.surgery, tmp_path / "surgery")
    manifest = json.loads((tmp_path / "surgery/surgery.json").read_text())
    (tmp_path / "surgery/surgery.json").write_text(json.dumps({**manifest, "base": str(link)}))
    shutil.copytree(made.adapter, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "surgery")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    before = made.content()
    for target in (made.base, link / "inner", tmp_path / "surgery"):
        outcome = run("fold", tmp_path / "adapter", "-o", target, "--force", "--json")
        assert outcome.json["error"]["code"] == "PSG602", target
    assert made.content() == before


def test_a_state_dict_is_as_readable_as_any_new_file(made: Place, tmp_path: Path) -> None:
    live = ps.apply(ps.capture(BertModel.from_pretrained(made.base)), "ia3")
    live.save_pretrained(tmp_path / "state")
    other = tmp_path / "other"
    other.touch()
    assert (tmp_path / "state/model.safetensors").stat().st_mode == other.stat().st_mode


def test_a_tokenizer_that_came_with_an_adapter_is_kept_too(made: Place, tmp_path: Path) -> None:
    graph = ps.capture(BertModel.from_pretrained(made.base))
    graph.source.build = replace(graph.source.build, tokenizer=tmp_path)
    for write in (graph.save_pretrained, ps.apply(graph, "ia3").save):
        with pytest.raises(ps.SurgeryError, match="PSG602"):
            write(tmp_path / "inner")
    assert not list(tmp_path.iterdir())


def test_what_was_loaded_and_trained_goes_back_to_its_place(made: Place) -> None:
    loaded = ps.load(made.surgery)
    for value in loaded.learnt().values():
        torch.nn.init.normal_(value)
    ps.apply(loaded, "ia3").save(made.surgery)
    again = ps.load(made.surgery)
    assert again.adapters == ("lora_qv", "ia3")
    for name, value in loaded.learnt().items():
        assert torch.equal(again.learnt()[name], value)
