"""Adapters of AdapterHub's that are damaged, ask for too much or were made for another base.

Each case is a change to a golden adapter; the error must name what is wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.errors import SurgeryError
from peftsurgery.language.rule_file import RuleFile
from peftsurgery.language.schema import Expect, Rule
from peftsurgery.language.where import Where
from tests.formats.golden import GOLDEN, captured

NAME = "bert"
CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
A = "bert.encoder.layer.0.attention.self.query.loras.golden.lora_A"


@dataclass(frozen=True)
class Adapter:
    """A directory of the library's that can be changed."""

    folder: Path

    def about(self, **changes: Any) -> None:
        """Change what is said beside the method's config."""
        file = self.folder / CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def config(self, **changes: Any) -> None:
        """Change the method's config."""
        values = json.loads((self.folder / CONFIG).read_text())
        self.about(config=values["config"] | changes)

    def tensors(self, changes: dict[str, Tensor | None]) -> None:
        found = {**load_file(self.folder / TENSORS), **changes}
        save_file({n: v for n, v in found.items() if v is not None}, self.folder / TENSORS)

    def pickled(self, content: Any) -> None:
        (self.folder / TENSORS).unlink()
        torch.save(content, self.folder / PICKLED)


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return Adapter(Path(shutil.copytree(GOLDEN / NAME / "lora", tmp_path / "adapter")))


class Opened:
    """What a pickle may do when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pickle-was-run",)


def compressed(adapter: Adapter) -> None:
    adapter.pickled(load_file(adapter.folder / TENSORS))
    file = adapter.folder / PICKLED
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content + bytes(10**6))


def head(tensors: dict[str, Tensor]) -> Callable[[Adapter], None]:
    return lambda a: save_file(tensors, a.folder / "model_head.safetensors")


CASES: dict[str, tuple[Callable[[Adapter], object], str, str]] = {
    "no config": (lambda a: (a.folder / CONFIG).unlink(), "PSG501", CONFIG),
    "a config that is a list": (lambda a: (a.folder / CONFIG).write_text("[]"), "PSG501", "object"),
    "NaN in the config": (lambda a: a.config(alpha=float("nan")), "PSG501", "NaN"),
    "an unknown method": (lambda a: a.config(architecture="reft"), "PSG502", "'reft'"),
    "a config by name": (lambda a: a.about(config="pfeiffer"), "PSG503", "pfeiffer"),
    "no name": (lambda a: a.about(name=None), "PSG503", "name"),
    "a rank that is none": (lambda a: a.config(r=0), "PSG503", "r cannot be 0"),
    "an alpha that is a text": (lambda a: a.config(alpha="6"), "PSG503", "alpha"),
    "layers that are no numbers": (lambda a: a.config(leave_out=["0"]), "PSG503", "leave_out"),
    "an old version": (lambda a: a.about(version="adapters.1.0.1"), "PSG504", "1.0.1"),
    "no version": (lambda a: a.about(version=None), "PSG503", "version"),
    "a method that is a list": (lambda a: a.config(architecture=["lora"]), "PSG502", "lora"),
    "an empty union": (lambda a: a.config(architecture="union", configs=[]), "PSG504", "union"),
    "a union of texts": (
        lambda a: a.config(architecture="union", configs=["a"]),
        "PSG503",
        "union",
    ),
    "DoRA": (lambda a: a.config(use_dora=True), "PSG504", "use_dora"),
    "a gate": (lambda a: a.config(use_gating=True), "PSG504", "use_gating"),
    "an unknown key": (lambda a: a.config(drop_out=0.5), "PSG504", "did you mean 'dropout'"),
    "an unwrapped projection": (lambda a: a.config(attn_matrices=["q", "o"]), "PSG503", "'o'"),
    "no place": (lambda a: a.config(attn_matrices=[]), "PSG504", "no place"),
    "no tensors": (lambda a: (a.folder / TENSORS).unlink(), "PSG505", TENSORS),
    "a truncated file": (
        lambda a: (a.folder / TENSORS).write_bytes((a.folder / TENSORS).read_bytes()[:-9]),
        "PSG505",
        TENSORS,
    ),
    "NaN": (lambda a: a.tensors({A: torch.full((4, 32), torch.nan)}), "PSG505", A),
    "whole numbers": (lambda a: a.tensors({A: torch.ones(4, 32, dtype=torch.int)}), "PSG505", A),
    "a pickle that runs code": (lambda a: a.pickled({A: Opened()}), "PSG505", "run code"),
    "a pickle of something else": (lambda a: a.pickled([1]), "PSG505", "by name"),
    "a pickle that is no archive": (
        lambda a: (a.folder / TENSORS).rename(a.folder / PICKLED),
        "PSG505",
        PICKLED,
    ),
    "a bomb": (compressed, "PSG505", "compressed"),
    "another model": (lambda a: a.about(model_type="gpt2"), "PSG506", "gpt2"),
    "a tensor too many": (
        lambda a: a.tensors({f"{A}.more": torch.ones(2)}),
        "PSG506",
        "lora_A.more",
    ),
    "fewer layers in the config": (lambda a: a.config(leave_out=[0]), "PSG506", "layer.0"),
    "a tensor too few": (lambda a: a.tensors({A: None}), "PSG507", "lora_A"),
    "more places in the config": (
        lambda a: a.config(attn_matrices=["q", "k", "v"]),
        "PSG507",
        "attention.self.key",
    ),
    "another shape": (lambda a: a.tensors({A: torch.ones(4, 31)}), "PSG507", "[4, 31]"),
    "another rank": (lambda a: a.config(r=3), "PSG507", "[3, 32]"),
    "a head of the library's own": (
        head({"heads.default.1.weight": torch.ones(2, 2)}),
        "PSG514",
        "heads.default.1.weight",
    ),
    "a head of another size": (head({"classifier.bias": torch.ones(4)}), "PSG514", "[4]"),
}


@pytest.mark.parametrize("size", [0, 2.5, -3, "x", True])
def test_a_size_that_is_none_is_named_as_the_library_names_it(size: Any, tmp_path: Path) -> None:
    union = Adapter(Path(shutil.copytree(GOLDEN / NAME / "mam", tmp_path / "adapter")))
    parts = json.loads((union.folder / CONFIG).read_text())["config"]["configs"]
    union.config(configs=[{**parts[0], "bottleneck_size": size}, *parts[1:]])
    with pytest.raises(SurgeryError, match="bottleneck_size cannot be") as caught:
        ps.from_adapterhub(captured(NAME), union.folder)
    assert caught.value.code == "PSG503"


@pytest.mark.parametrize("name", [NAME])
@pytest.mark.parametrize(("change", "code", "text"), CASES.values(), ids=CASES)
def test_what_is_wrong_is_named(
    name: str,
    change: Callable[[Adapter], object],
    code: str,
    text: str,
    adapter: Adapter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(adapter.folder)
    change(adapter)
    with pytest.raises(SurgeryError) as caught:
        ps.from_adapterhub(captured(name), adapter.folder)
    assert caught.value.code == code
    assert text in str(caught.value)
    assert not (adapter.folder / "pickle-was-run").exists()


@pytest.mark.parametrize("name", [NAME])
def test_a_pickle_of_plain_tensors_is_read(name: str, adapter: Adapter) -> None:
    plain = load_file(adapter.folder / TENSORS)
    adapter.pickled(plain)
    operated = ps.from_adapterhub(captured(name), adapter.folder, name="mine")
    place = "bert.encoder.layer.0.attention.self.query.mine.A"
    assert torch.equal(operated.get_parameter(place), plain[A])


def changed(file: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(values | changes))

    return change


SETUP, FUSION = "adapter_setup.json", "first,second/adapter_fusion_config.json"
STACK = {"type": "Stack", "children": [{"type": "single", "children": ["first"]}] * 2}
ELSEWHERE = {"type": "Fuse", "children": [{"type": "single", "children": ["../first"]}] * 2}
FUSIONS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a stack": (changed(SETUP, adapter_setup=STACK), "PSG504", "Stack"),
    "a setup that is none": (changed(SETUP, adapter_setup=[1]), "PSG504", "[1]"),
    "a head of the setup's own": (changed(SETUP, head_setup="default"), "PSG504", "default"),
    "an adapter from elsewhere": (changed(SETUP, adapter_setup=ELSEWHERE), "PSG304", "../first"),
    "an adapter that is not there": (lambda f: shutil.rmtree(f / "second"), "PSG501", "second"),
    "a fusion that is not there": (lambda f: (f / FUSION).unlink(), "PSG501", "fusion"),
    "the fusion of others": (changed(FUSION, adapter_names=["first", "third"]), "PSG503", "third"),
    "a fusion that cools down": (
        lambda f: changed(
            FUSION, config=json.loads((f / FUSION).read_text())["config"] | {"temperature": True}
        )(f),
        "PSG504",
        "temperature",
    ),
}


@pytest.mark.parametrize("name", [NAME])
@pytest.mark.parametrize(("change", "code", "text"), FUSIONS.values(), ids=FUSIONS)
def test_what_is_wrong_with_a_fusion_is_named(
    name: str, change: Callable[[Path], object], code: str, text: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(GOLDEN / name / "fusion", tmp_path / "fusion"))
    change(folder)
    with pytest.raises(SurgeryError) as caught:
        ps.from_adapterhub(captured(name), folder)
    assert caught.value.code == code
    assert text in str(caught.value)


def at(*paths: str) -> RuleFile:
    """LoRA at the modules of these paths."""
    file = ps.load_rules("lora_qv")
    update = {"where": Where(paths=paths), "expect": Expect(at_least=1)}
    return file.model_copy(update={"rules": (file.rules[0].model_copy(update=update),)})


def layer(number: int, module: str) -> str:
    return f"bert.encoder.layer.{number}.{module}"


@pytest.mark.parametrize("name", [NAME])
def test_a_head_can_be_left_out(name: str, adapter: Adapter) -> None:
    head({"heads.default.1.weight": torch.ones(2, 2)})(adapter)
    operated = ps.from_adapterhub(captured(name), adapter.folder, head=False)
    assert not operated.trained


WRITING: dict[str, tuple[Callable[[ps.GraphModel], Any], str, str]] = {
    "nothing": (lambda g: g, "PSG511", "no adapters"),
    "two adapters": (lambda g: ps.apply(g, ["lora_qv", "houlsby"]), "PSG511", "2 adapters"),
    "two methods": (lambda g: ps.apply(g, ["lora_qv", "houlsby"], "a"), "PSG512", "one method"),
    "a method it has not": (lambda g: ps.apply(g, "dora"), "PSG512", "dora"),
    "a place it has not": (lambda g: ps.apply(g, "lora_attention"), "PSG512", "output.dense"),
    "widths that follow the model's": (
        lambda g: ps.apply(g, "prefix_tuning_mlp", length=3),
        "PSG512",
        "'bottleneck' is 0",
    ),
    "another matrix in another layer": (
        lambda g: ps.apply(
            g, at(layer(0, "attention.self.query"), layer(1, "attention.self.value"))
        ),
        "PSG512",
        "attention.self",
    ),
    "a parameter of the model's body": (
        lambda g: ps.apply(
            g, ["lora_qv", Rule(match="parameter", where=Where(kind="bias"), train=True)], "a"
        ),
        "PSG512",
        "was trained",
    ),
}


@pytest.mark.parametrize("name", [NAME])
@pytest.mark.parametrize(("change", "code", "text"), WRITING.values(), ids=WRITING)
def test_what_the_library_has_no_form_for_is_not_written(
    name: str,
    change: Callable[[ps.GraphModel], Any],
    code: str,
    text: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(SurgeryError) as caught:
        ps.to_adapterhub(change(captured(name)), tmp_path / "out")
    assert caught.value.code == code
    assert text in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_a_type_that_the_model_is_not_of_is_refused(adapter: Adapter) -> None:
    model = ps.capture(nn.Sequential(nn.Linear(3, 3)), (torch.ones(2, 3),))
    with pytest.raises(SurgeryError, match=r"PSG506: .*for a 'bert', not for a 'Sequential'"):
        ps.from_adapterhub(model, adapter.folder)


@pytest.mark.parametrize("name", [NAME])
def test_only_an_adapter_is_written_over(name: str, adapter: Adapter, tmp_path: Path) -> None:
    operated = ps.from_adapterhub(captured(name), adapter.folder)
    written = tmp_path / "written"
    ps.to_adapterhub(operated, written)
    ps.to_adapterhub(operated, written)
    (written / CONFIG).unlink()
    with pytest.raises(SurgeryError, match="PSG601"):
        ps.to_adapterhub(operated, written)
