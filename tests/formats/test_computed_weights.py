"""Weights that a model computes of its parameters, on files: refused there, and folded in memory.

A weight that the files only hold under other axes is folded on files: ``test_other_axes.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import peftsurgery as ps
from peftsurgery.errors import SurgeryError
from peftsurgery.formats.saved_plan import saved_plan
from peftsurgery.formats.streamed_fold import estimate_fold

FACTORY = "tests.formats.test_computed_weights:made"


class Lengths(nn.Module):
    """A linear whose weight is directions and lengths, and one whose weight is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Linear(8, 6))
        self.plain = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.plain(torch.tanh(self.normed(x)))
        return result


def made() -> tuple[nn.Module, dict[str, Tensor]]:
    """The module, and inputs for it."""
    torch.manual_seed(0)
    return Lengths(), {"x": torch.randn(3, 8)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A directory as a fold of such a module writes it."""
    folder = tmp_path / "base"
    folder.mkdir()
    save_model(made()[0], str(folder / "model.safetensors"))
    (folder / "peftsurgery.json").write_text(json.dumps({"base": FACTORY, "folded": []}))
    return folder


def adapted(base: Path, folder: Path, path: str) -> Path:
    """A surgery on one of the linears, with values that show."""
    model = ps.apply(
        ps.capture(str(base)), "lora_all_linear", rank=2, alpha=4, where={"path": path}
    )
    model.bind()
    for value in model.learnt(*model.active).values():
        nn.init.normal_(value, std=0.3)
    model.save(folder)
    return folder


def test_a_computed_weight_is_refused_on_files_and_folded_in_memory(
    tmp_path: Path, base: Path
) -> None:
    surgery = adapted(base, tmp_path / "surgery", "normed")
    assert "fold" not in json.loads((surgery / "surgery.json").read_text())
    assert saved_plan(surgery, None) is None
    there = {path.name for path in tmp_path.iterdir()}
    for ask in (ps.fold_checkpoint, estimate_fold):
        with pytest.raises(SurgeryError, match=r"PSG416.*'normed' is computed of") as refused:
            ask(surgery, None, tmp_path / "out")
        assert refused.value.hint == "fold in memory: fold_to_directory"
    assert {path.name for path in tmp_path.iterdir()} == there

    ps.fold_to_directory(surgery, tmp_path / "whole")
    module, inputs = made()
    factors = load_file(surgery / "adapter.safetensors")
    A, B = (factors[name] for name in sorted(factors))
    weight = module.normed.weight.detach() + 2 * B @ A
    found, _ = made()
    found.load_state_dict(load_file(tmp_path / "whole/model.safetensors"))
    torch.testing.assert_close(found.normed.weight, weight, rtol=1e-5, atol=1e-6)
    operated = ps.load(surgery)
    torch.testing.assert_close(found(**inputs), operated(**inputs), rtol=1e-5, atol=1e-6)


def test_a_plain_weight_beside_it_is_folded_on_files(tmp_path: Path, base: Path) -> None:
    surgery = adapted(base, tmp_path / "surgery", "plain")
    report = ps.fold_checkpoint(surgery, None, tmp_path / "out")
    assert report.changed.keys() == {"plain.weight"}
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    assert {n for n in before if not torch.equal(before[n], after[n])} == {"plain.weight"}
    assert ps.verify(tmp_path / "out").changed == 1
