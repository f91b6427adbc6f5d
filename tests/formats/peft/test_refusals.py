"""Adapters of peft that are damaged, ask for too much or were made for another base.

Each case is a change to an adapter that peft wrote; the error must name what is wrong.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.errors import SurgeryError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
A, B = (f"base_model.model.first.lora_{letter}.weight" for letter in "AB")


class Small(nn.Module):
    """A table and two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(self.table(ids)).relu())
        return result


@cache
def captured() -> ps.GraphModel:
    torch.manual_seed(0)
    return ps.capture(Small(), (torch.randint(11, (2, 3)),))


@dataclass(frozen=True)
class Adapter:
    """A directory of peft's that can be changed."""

    folder: Path

    def config(self, **changes: Any) -> None:
        file = self.folder / CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def tensors(self, **changes: Tensor | None) -> None:
        found = {**load_file(self.folder / TENSORS), **changes}
        save_file({n: v for n, v in found.items() if v is not None}, self.folder / TENSORS)

    def rename(self, old: str, new: str) -> None:
        found = load_file(self.folder / TENSORS)
        save_file({n.replace(old, new): v for n, v in found.items()}, self.folder / TENSORS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["first", "second"])
    get_peft_model(Small(), config).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Adapter:
    return Adapter(Path(shutil.copytree(saved, tmp_path / "adapter")))


Change = Callable[[Adapter], Any]


def text(content: str | bytes) -> Change:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda adapter: (adapter.folder / CONFIG).write_bytes(data)


def config(**changes: Any) -> Change:
    return lambda adapter: adapter.config(**changes)


def tensors(changes: dict[str, Tensor | None]) -> Change:
    return lambda adapter: adapter.tensors(**changes)


def pickled(adapter: Adapter) -> None:
    (adapter.folder / TENSORS).rename(adapter.folder / "adapter_model.bin")


def truncated(adapter: Adapter) -> None:
    data = (adapter.folder / TENSORS).read_bytes()
    (adapter.folder / TENSORS).write_bytes(data[:-9])


DAMAGED: dict[str, tuple[Change, str]] = {
    "no config": (lambda a: (a.folder / CONFIG).unlink(), "PSG501: .*no adapter_config.json"),
    "empty config": (text(""), "PSG501: .*cannot be read"),
    "a list": (text("[]"), "PSG501: .*no JSON object"),
    "not utf-8": (text(b"\xff\xfe{}"), "PSG501: .*cannot be read"),
    "deep": (text("[" * 100_000), "PSG501: "),
    "twice": (text('{"r": 1, "r": 2}'), "PSG501: .*'r' appears twice"),
    "nan": (text('{"peft_type": "LORA", "lora_alpha": NaN}'), "PSG501: .*NaN"),
    "no tensors": (lambda a: (a.folder / TENSORS).unlink(), "PSG505: .*no adapter_model"),
    "pickle": (pickled, "PSG505: .*adapter_model.bin, a pickle"),
    "truncated": (truncated, "PSG505: .*cannot be read"),
    "zero bytes": (lambda a: (a.folder / TENSORS).write_bytes(b""), "PSG505: .*cannot be read"),
    "a directory": (
        lambda a: ((a.folder / TENSORS).unlink(), (a.folder / TENSORS).mkdir()),
        "PSG505: .*no adapter_model",
    ),
    "infinite": (tensors({A: torch.full((2, 8), torch.inf)}), f"PSG505: .*'{A}' holds NaN or inf"),
    "eight bits": (
        tensors({A: torch.ones(2, 8).to(torch.float8_e4m3fn)}),
        f"PSG505: .*'{A}' holds torch.float8_e4m3fn",
    ),
    "complex": (
        tensors({A: torch.ones(2, 8, dtype=torch.complex64)}),
        f"PSG505: .*'{A}' holds torch.complex64",
    ),
    "a FIFO": (
        lambda a: ((a.folder / TENSORS).unlink(), os.mkfifo(a.folder / TENSORS)),
        "PSG505: .*no adapter_model",
    ),
    "whole numbers": (tensors({A: torch.ones(2, 8, dtype=torch.int8)}), f"PSG505: .*'{A}' holds"),
}
UNFIT: dict[str, tuple[Change, str]] = {
    "unknown method": (config(peft_type="LORRA"), "PSG502: .*'LORRA'\n  did you mean 'LORA'"),
    "a list of methods": (config(peft_type=["LORA"]), r"PSG502: .*\['LORA'\]"),
    "an object for a method": (config(peft_type={"LORA": 1}), "PSG502: .*{'LORA': 1}"),
    "base": (config(base_model_name_or_path=3), "PSG503: .*base_model_name_or_path is 3"),
    "bases": (config(base_model_name_or_path=["a"]), "PSG503: .*base_model_name_or_path is"),
    "no method": (config(peft_type=None), "PSG502: .*None"),
    "rank 0": (config(r=0), "PSG503: .*r cannot be 0"),
    "rank as text": (config(r="2"), "PSG503: .*r cannot be '2'"),
    "rank missing": (config(r=None), "PSG503: .*r cannot be None"),
    "alpha as text": (config(lora_alpha="4"), "PSG503: .*lora_alpha cannot be '4'"),
    "alpha beyond floats": (config(lora_alpha=10**400), "PSG503: .*lora_alpha cannot be 1000"),
    "dropout": (config(lora_dropout=1.5), "PSG503: .*lora_dropout cannot be 1.5"),
    "no switch": (config(use_rslora=None, r=3), "PSG507"),
    "a switch": (config(use_rslora="yes"), "PSG503: .*use_rslora cannot be 'yes'"),
    "pattern rank": (
        config(rank_pattern={"first": 0}),
        r"PSG503: .*rank_pattern\['first'\] cannot be 0",
    ),
    "pattern list": (config(alpha_pattern=["first"]), "PSG503: .*alpha_pattern is no object"),
    "pattern typo": (
        config(alpha_pattern={"frist": 3}),
        "PSG508: alpha_pattern names 'frist'.*\n  did you mean 'first'",
    ),
    "pattern regex": (config(rank_pattern={"(": 3}), "PSG141"),
    "pattern for ever": (config(rank_pattern={"(a+)+": 3}), "PSG508: rank_pattern names"),
    "dora without m": (config(use_dora=True), "PSG507: .*no 'lora_magnitude_vector'"),
    "lora_bias without it": (config(lora_bias=True), "PSG507: .*no 'lora_B.bias'"),
    "typo": (
        config(target_modules=["first", "secnd"]),
        "PSG508: .*names 'secnd'.*\n  did you mean 'second'",
    ),
    "uncovered": (config(target_modules=["first", "second", "table"]), "PSG508: .*means 'table'"),
    "uncovered regex": (config(target_modules=".*"), "PSG508: .*means 'table'"),
    "left over": (config(target_modules=["first"]), "PSG508: .*tensors for 'second'"),
    "targets": (config(target_modules={"first": 1}), "PSG503: .*no list of names"),
    "layers": (config(layers_to_transform=["0"]), "PSG503: .*layers_to_transform"),
    "excluded": (config(exclude_modules=["second"]), "PSG508: .*tensors for 'second'"),
    "saved": (config(modules_to_save=["table"]), "PSG508: modules_to_save names 'table'"),
    "saved typo": (
        config(modules_to_save=["tabel"]),
        "PSG508: .*'tabel'.*\n  did you mean 'table'",
    ),
    "A alone": (tensors({B: None}), f"PSG507: '{A}' has no 'lora_B.weight' beside it"),
    "rank mismatch": (
        config(r=3),
        r"PSG507: .*lora_A.weight' has shape \[2, 8\], where .* \[3, 8\]",
    ),
    "other width": (tensors({A: torch.ones(2, 9)}), f"PSG507: '{A}' has shape .2, 9."),
    "magnitude": (
        tensors({"base_model.model.first.lora_magnitude_vector": torch.ones(6)}),
        "PSG507: .*lora_magnitude_vector",
    ),
    "other base": (
        lambda a: a.rename("first", "firsst"),
        "PSG506: .*'firsst', which is not in the model\n  did you mean 'first'",
    ),
    "other class": (
        lambda a: a.rename("model.first", "model.encoder.first"),
        "PSG506: .*'encoder.first', which is not in the model\n  did you mean 'first'",
    ),
    "no prefix": (lambda a: a.rename("base_model.model.", ""), "PSG506: .*does not begin with"),
    "stray bias": (
        tensors({"base_model.model.first.base_layer.bias": torch.ones(6)}),
        "PSG507: .*'first.bias' differs from it",
    ),
    "stray weight": (
        tensors({"base_model.model.table.weight": torch.ones(11, 8)}),
        "PSG506: .*'base_model.model.table.weight' is for a parameter that the adapter's config",
    ),
    "stray name": (
        tensors({"base_model.model.first.lora_C": torch.ones(1)}),
        "PSG506: .*'base_model.model.first.lora_C' has no place",
    ),
}
NOT_HONOURED: dict[str, Any] = {
    "init_lora_weights": "pissa",
    "layer_replication": [[0, 1]],
    "megatron_config": {"a": 1},
    "use_qalora": True,
    "arrow_config": {"top_k": 2},
    "alora_invocation_tokens": [3],
    "use_bdlora": {"nblocks": 2},
    "kasa_config": {"beta": 1.0},
    "velora_config": {"a": 1},
    "monteclora_config": {"a": 1},
    "bias": "some",
    "fan_in_fan_out": "both",
    "a_switch_of_tomorrow": 0.5,
}
HARMLESS: dict[str, Any] = {
    "ensure_weight_tying": True,  # no table here is tied to another
    "init_lora_weights": "gaussian",
    "megatron_core": "megatron.core",
    "qalora_group_size": 32,
    "loftq_config": {},
    "eva_config": {"rho": 2.0},
    "runtime_config": {"ephemeral_gpu_offload": True},
    "task_type": "CAUSAL_LM",
    "fan_in_fan_out": True,
    "a_switch_of_tomorrow": False,
}


def refuses(adapter: Adapter, pattern: str) -> None:
    before = sorted((p.name, p.is_file() and p.read_bytes()) for p in adapter.folder.iterdir())
    with pytest.raises(SurgeryError) as caught:
        ps.from_peft(captured(), adapter.folder)
    assert re.match(pattern, str(caught.value)), str(caught.value)
    after = sorted((p.name, p.is_file() and p.read_bytes()) for p in adapter.folder.iterdir())
    assert after == before


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_adapter_is_refused(adapter: Adapter, case: str) -> None:
    change, pattern = DAMAGED[case]
    change(adapter)
    refuses(adapter, pattern)


@pytest.mark.parametrize("case", UNFIT)
def test_an_adapter_that_does_not_fit_is_refused(adapter: Adapter, case: str) -> None:
    change, pattern = UNFIT[case]
    change(adapter)
    refuses(adapter, pattern)


@pytest.mark.parametrize("key", NOT_HONOURED)
def test_what_cannot_be_honoured_is_refused_by_name(adapter: Adapter, key: str) -> None:
    adapter.config(**{key: NOT_HONOURED[key]})
    refuses(adapter, f"PSG504: .*{key}")


@pytest.mark.parametrize("key", HARMLESS)
def test_what_has_no_effect_on_a_trained_adapter_is_accepted(adapter: Adapter, key: str) -> None:
    adapter.config(**{key: HARMLESS[key]})
    assert len(ps.from_peft(captured(), adapter.folder).cuts) == 2


def test_a_directory_that_holds_named_adapters_says_so(adapter: Adapter) -> None:
    with pytest.raises(SurgeryError, match=r"PSG501: .*\n  it holds adapters in adapter"):
        ps.from_peft(captured(), adapter.folder.parent)
    with pytest.raises(SurgeryError, match="PSG501: there is nothing at"):
        ps.from_peft(captured(), adapter.folder / "missing")


def test_names_and_models_that_cannot_be_used(adapter: Adapter) -> None:
    with pytest.raises(SurgeryError, match="PSG304"):
        ps.from_peft(captured(), adapter.folder, name="a.b")
    with pytest.raises(SurgeryError, match=r"PSG309: .*not on a Small"):
        ps.from_peft(Small(), adapter.folder)
    once = ps.from_peft(captured(), adapter.folder)
    with pytest.raises(SurgeryError, match="PSG304"):
        ps.from_peft(once, adapter.folder)
