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

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
HEAD = "model_head.safetensors"
METHODS = ("lora", "lora_all", "lora_head", "ia3", "double_seq_bn", "par_bn")


def cases() -> list[Any]:
    """Every adapter of one config, by architecture."""
    return [
        pytest.param(name, method, id=f"{name}-{method}")
        for name in ARCHITECTURES
        for method in METHODS
        if (GOLDEN / name / method).is_dir()
    ]


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors; a prefix once, which the library keeps under several names."""
    if (folder / TENSORS).is_file():
        return load_file(folder / TENSORS)
    found = torch.load(folder / PICKLED, weights_only=True)
    return {name: value for name, value in found.items() if ".pool." not in name}


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
    same_tensors(load_file(tmp_path / "out" / TENSORS), tensors_in(source))
    for file in source.glob("*.json"):
        assert json.loads((tmp_path / "out" / file.name).read_text()) == json.loads(
            file.read_text()
        )


def test_a_head_comes_along_and_goes_out_again(tmp_path: Path) -> None:
    source = GOLDEN / "bert" / "lora_head"
    operated = ps.from_adapterhub(captured("bert"), source)
    assert operated.trained == {"classifier.weight", "classifier.bias"}
    ps.to_adapterhub(operated, tmp_path / "out")
    same_tensors(load_file(tmp_path / "out" / HEAD), load_file(source / HEAD))


def same_tensors(made: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    assert made.keys() == given.keys()
    assert all(torch.equal(made[key], given[key]) for key in given)
