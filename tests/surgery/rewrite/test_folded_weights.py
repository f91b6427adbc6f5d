"""Folded weights: computed some rows at a time, and rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftsurgery as ps
from peftsurgery.surgery.rewrite import folded_weights as weights
from peftsurgery.surgery.rewrite.folded_weights import folded_weights
from tests.models.captured import captured
from tests.surgery.fold.test_folding import assert_same, first
from tests.surgery.reference import randomise


def large() -> nn.Sequential:
    """Weights of so many elements that they are folded in blocks, one of them kept as (in, out)."""
    return nn.Sequential(nn.Linear(640, 1024, bias=False), Conv1D(832, 1024)).to(torch.bfloat16)


def test_a_large_weight_is_the_fp32_sum_rounded_once() -> None:
    model = large()
    graph = ps.capture(model, inputs=(torch.randn(2, 3, 640, dtype=torch.bfloat16),))
    operated = randomise(ps.apply(graph, "lora_all_linear", rank=4, alpha=8), scale=0.3)
    folded = ps.fold(operated)
    gaps = []
    for match in operated.report.matches:
        A, B = (operated.get_parameter(name).detach() for name in match["added"])
        weight = model.get_parameter(match["parameter"]).detach().float()
        is_turned = weight.shape != (len(B), A.shape[1])
        exact = weight + 2.0 * ((B @ A).T if is_turned else B @ A)
        written = folded.get_parameter(match["parameter"]).detach()
        assert torch.equal(written, exact.to(torch.bfloat16))
        gaps.append((written.float() - exact).abs())
    error = ps.fold_error(operated)
    assert error.largest == max(float(gap.max()) for gap in gaps)
    assert error.mean == pytest.approx(float(torch.cat([g.flatten() for g in gaps]).mean()))


@pytest.mark.parametrize("rule", ["lora_all_linear", "dora", "ia3"])
@pytest.mark.parametrize("name", ["gpt2", "bloom", "llama"])
def test_weights_folded_by_rows_compute_the_same(
    name: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SMALL", 8)
    operated = randomise(ps.apply(captured(name), rule), scale=0.02)
    assert_same(first(ps.fold(operated), name), first(operated, name))


def test_every_changed_weight_comes_once() -> None:
    operated = randomise(ps.apply(captured("llama"), "lora_all_linear"))
    found = folded_weights(operated.foldable())
    names = [name for weight in found for name in weight.names]
    assert len(names) == len(set(names)) == len(operated.report.matches)


def test_a_parameter_without_dimensions_is_folded() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    rule = """
name: shifted
rules:
  - match: parameter
    params: {s: {shape: [], init: "0.5"}}
    rewrite: {W: W + s}
    fold: {W: W + s}
"""
    operated = ps.apply(ps.capture(Scaled(), inputs=(torch.ones(2, 3),)), ps.parse_rules(rule))
    assert ps.fold(operated).get_parameter("scale").item() == 2.5
