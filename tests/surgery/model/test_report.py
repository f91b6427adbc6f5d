"""Reports: every cut with what it added, counts as the model's parameters have them."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.surgery.model.report import Report, counted
from peftsurgery.surgery.plan.plan import Plan
from tests.models.captured import captured

RULES = """
name: t
rules:
  - match: linear
    where: {role: ffn.up, not: {layers: 3}}
    params: {A: {shape: [out, in]}, s: {shape: [out], train: false}}
    rewrite: s * y + linear(x, A)
"""


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@cache
def operated() -> ps.OperatedModel:
    return ps.apply(ps.capture(Stack(), {"x": torch.randn(2, 4)}), ps.parse_rules(RULES))


def test_every_cut_is_there_with_what_it_added() -> None:
    report, layers = operated().report, [0, 1, 2, 4, 5]
    assert [match["module"] for match in report.matches] == [f"layers.{i}.up" for i in layers]
    added = [name for match in report.matches for name in match["added"]]
    assert added == [f"layers.{i}.up.t.{name}" for i in layers for name in "As"]
    parameters = dict(operated().named_parameters())
    assert report.added == {name: list(parameters[name].shape) for name in added}
    assert {match["block"] for match in report.matches} == {f"layers.{i}" for i in layers}


def test_counts_are_those_of_the_parameters() -> None:
    report = operated().report
    assert report.total == sum(p.numel() for p in operated().parameters())
    assert report.trainable == 5 * 4 * 6
    assert report.coverage.roles["ffn.up"].matched == 5
    assert f"{report.trainable} of {report.total:,}" in str(report)


def test_near_misses_of_equal_layers_are_one_line() -> None:
    lines = [line for line in str(operated().report).splitlines() if line.startswith("  not ")]
    assert lines == [
        "  not layers.{0,1,2,4,…}.down: role is ffn.down, not ffn.up",
        "  not layers.3.up: it is (layers: 3)",
    ]


def test_a_report_is_data() -> None:
    report = operated().report
    data = json.loads(json.dumps(report.to_dict()))
    assert data["matches"] == report.matches
    assert data["active"] == ["t"]
    assert data["coverage"]["ffn.up"] == {"matched": 5, "of": 6}


def test_what_rests_and_what_is_packed_is_counted_as_such() -> None:
    first, second = (nn.Parameter(torch.zeros(size)) for size in (3, 4))
    frozen = nn.Parameter(torch.zeros(5), requires_grad=False)
    assert counted([first, second, frozen], [second]) == (3, 12)
    report = Report(Plan((), (), ()), {"a": True, "b": False}, {}, 3, 20, ("seen",), {"b": 0.5})
    assert (report.trainable, report.total) == (3, 20)
    text = str(report)
    assert "adapters: a, b (inactive)" in text
    assert "note: seen" in text
    assert "'b' lacks 50.00% of the change" in text
    assert report.to_dict()["matches"] == []


@pytest.mark.parametrize("name", ["trainable", "total", "notes", "lost", "added"])
def test_a_model_without_rules_has_an_empty_report(name: str) -> None:
    report = Report(Plan((), (), ()), {}, {}, 0, 0)
    assert not getattr(report, name)


@pytest.mark.parametrize("where", [{}, {"path": ".*q_proj"}])
def test_the_report_folds_near_misses_of_equal_layers(where: dict[str, str]) -> None:
    text = str(ps.apply(captured("llama"), "lora_qv", where=where).report)
    misses = [line for line in text.splitlines() if line.startswith("  not ")]
    assert misses
    assert all("layers.{0.." in line for line in misses if ".layers." in line)
    assert len({line.split(":")[0] for line in misses}) == len(misses)
