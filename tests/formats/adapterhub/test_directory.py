"""Adapters of AdapterHub's library, against what the library itself computed with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import peftsurgery as ps
from tests.formats.golden import ARCHITECTURES, GOLDEN, captured, expected, inputs
from tests.surgery.reference import randomise

TENSORS = "adapter.safetensors"
METHODS = (
    *("lora", "lora_all", "lora_head", "ia3", "seq_bn", "seq_bn_drop", "double_seq_bn", "par_bn"),
    *("fusion", "prefix_flat", "prefix_mlp", "mam", "unipelt", "prompt_tuning"),
)


def cases() -> list[Any]:
    """Every adapter of one config, by architecture."""
    return [
        pytest.param(name, method, id=f"{name}-{method}")
        for name in ARCHITECTURES
        for method in METHODS
        if (GOLDEN / name / method).is_dir()
    ]


def tensors_in(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of every file, by its name; a prefix once, which the library repeats."""
    found = {}
    for file in (*folder.rglob("*.safetensors"), *folder.rglob("*.bin")):
        safe = file.suffix == ".safetensors"
        tensors = load_file(file) if safe else torch.load(file, weights_only=True)
        name = file.relative_to(folder) if safe else file.with_name(TENSORS).relative_to(folder)
        found[str(name)] = {key: value for key, value in tensors.items() if ".pool." not in key}
    return found


def configs_in(folder: Path) -> dict[str, Any]:
    return {
        str(file.relative_to(folder)): json.loads(file.read_text())
        for file in folder.rglob("*.json")
    }


def logits(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs(name)).logits
    return result


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_models_are_the_library_s(name: str) -> None:
    wanted = expected(name)["base"]
    assert (logits(captured(name), name) - wanted).abs().max() <= 1e-6 * max(1, wanted.abs().max())


@pytest.mark.parametrize(("name", "method"), cases())
def test_an_adapter_computes_what_the_library_computed(name: str, method: str) -> None:
    operated = ps.from_adapterhub(captured(name), GOLDEN / name / method)
    assert (logits(operated, name) - expected(name)[method]).abs().max() <= 1e-5


@pytest.mark.parametrize(("name", "method"), cases())
def test_an_adapter_comes_out_as_it_went_in(name: str, method: str, tmp_path: Path) -> None:
    source = GOLDEN / name / method
    operated = ps.from_adapterhub(captured(name), source)
    ps.to_adapterhub(operated, tmp_path / "out")
    made, given = tensors_in(tmp_path / "out"), tensors_in(source)
    assert {file: set(tensors) for file, tensors in made.items()} == {
        file: set(tensors) for file, tensors in given.items()
    }
    for file, tensors in given.items():
        assert all(torch.equal(made[file][key], value) for key, value in tensors.items())
    assert configs_in(tmp_path / "out") == configs_in(source)


def test_a_head_comes_along_and_stays_apart_from_the_base() -> None:
    operated = ps.from_adapterhub(captured("bert"), GOLDEN / "bert" / "lora_head")
    assert operated.trained == {"classifier.weight", "classifier.bias"}
    assert torch.equal(logits(operated.base, "bert"), logits(captured("bert"), "bert"))


def test_an_older_head_is_not_taken_for_the_adapter_s(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    ps.to_adapterhub(ps.from_adapterhub(captured("bert"), GOLDEN / "bert" / "lora_head"), folder)
    assert ps.from_adapterhub(captured("bert"), folder).trained
    headless = ps.from_adapterhub(captured("bert"), GOLDEN / "bert" / "lora")
    ps.to_adapterhub(headless, folder)
    assert not ps.from_adapterhub(captured("bert"), folder).trained


@pytest.mark.parametrize("method", ["lora_all", "ia3"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_folds_computes_the_same_folded(name: str, method: str) -> None:
    folded = ps.fold(ps.from_adapterhub(captured(name), GOLDEN / name / method))
    assert (logits(folded, name) - expected(name)[method]).abs().max() <= 1e-5


# What the library has of ours, with the settings that it needs.
OWN: dict[str, dict[str, Any]] = {
    "lora_qv": {"rank": 2},
    "ia3": {"outputs": ["attn.k", "attn.v", "ffn.up"], "inputs": []},
    "houlsby": {},
    "pfeiffer": {"leave_out": [1]},
    "parallel_adapter": {"scaling": 2.0},
    "adapter_drop": {},
    "prefix_tuning": {"length": 3},
    "prefix_tuning_mlp": {"length": 3, "width": 32, "bottleneck": 4},
    "mam_adapter": {"length": 3, "bottleneck": 4},
    "unipelt": {"rank": 2, "length": 3, "bottleneck": 4},
    "prompt_after_embedding": {"length": 3},
}


@pytest.mark.parametrize("name", ["bert"])
@pytest.mark.parametrize("rule", OWN)
def test_what_was_applied_here_comes_back(name: str, rule: str, tmp_path: Path) -> None:
    operated = randomise(ps.apply(captured(name), rule, "mine", **OWN[rule]), scale=0.2).eval()
    ps.to_adapterhub(operated, tmp_path / "out")
    again = ps.from_adapterhub(captured(name), tmp_path / "out").eval()
    assert again.adapters == ("mine",)
    assert torch.equal(logits(again, name), logits(operated, name))
    assert not torch.equal(logits(again, name), logits(captured(name), name))
