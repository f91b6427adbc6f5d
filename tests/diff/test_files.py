"""Rule files and safetensors files are compared without a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import peftsurgery as ps
from tests.test_house import ROOT

LORA = ROOT / "rules" / "lora_qv.yaml"


def test_tensors_differ_by_header_and_by_value(tmp_path: Path) -> None:
    one = {f"h.{n}.w": torch.ones(4, 4) for n in range(3)} | {"old": torch.ones(2)}
    other = {**one, "h.1.w": torch.ones(4, 5), "new": torch.ones(2), "h.2.w": torch.zeros(4, 4)}
    del other["old"]
    save_file(one, tmp_path / "a.safetensors")
    save_file(other, tmp_path / "b.safetensors")
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    headers = [str(line) for line in ps.diff(*paths).summary.lines]
    assert sorted(headers) == sorted(
        ["~ h.1.w: F32[4, 4] → F32[4, 5]", "- old: F32[2]", "+ new: F32[2]"]
    )
    values = [str(line) for line in ps.diff(*paths, weights=True).summary.lines]
    assert any(line.startswith("~ h.2.w: ") for line in values)
    assert not any("h.0.w" in line for line in values)
    assert "h.1.w" in ps.diff(*paths).to_html()


def test_shipped_rules_are_compared_by_name() -> None:
    told = [str(line) for line in ps.diff("lora_qv", "ia3").summary.lines]
    assert told == [str(line) for line in ps.diff(LORA, LORA.with_name("ia3.yaml")).summary.lines]
    assert any("folds into W" in line for line in told)


def test_a_file_and_a_model_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(ps.SurgeryError) as refused:
        ps.diff(LORA, tmp_path)
    assert refused.value.code == "PSG905"
