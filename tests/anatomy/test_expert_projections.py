"""Projections of attention that are not linears: experts, and convolutions in groups.

The tables say what JetMoE's and SqueezeBERT's own code does.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.anatomy import survey
from peftsurgery.errors import SurgeryError
from tests.models.zoo import hf


class Mixture(nn.Module):
    """Attention of one head whose queries, and what is made of its result, are two experts'."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.key, self.value = nn.Linear(8, 2), nn.Linear(8, 8), nn.Linear(8, 8)
        self.first, self.last = (nn.Parameter(torch.randn(2, 8, 8)) for _ in range(2))

    def chosen(self, weights: Tensor, x: Tensor, choice: Tensor) -> Tensor:
        rows = (x.flatten(0, 1)[:, None] @ weights[choice.flatten()])[:, 0]
        return rows.view(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        weight, choice = self.route(x).softmax(-1).max(-1)
        q, k, v = self.chosen(self.first, x, choice), self.key(x), self.value(x)
        o = nn.functional.scaled_dot_product_attention(*(t[:, None] for t in (q, k, v)))[:, 0]
        result: Tensor = x + self.chosen(self.last, o, choice) * weight[..., None]
        return result


def test_experts_are_projections() -> None:
    torch.manual_seed(0)
    graph = ps.capture(Mixture(), {"x": torch.randn(2, 5, 8)})
    sites = survey(graph.base_capture)
    assert {(s.kind, s.parameter): s.role for s in sites if s.kind in ("linear", "experts")} == {
        ("linear", "route.weight"): "moe.router",
        ("linear", "key.weight"): "attn.k",
        ("linear", "value.weight"): "attn.v",
        ("experts", "first"): "attn.q",
        ("experts", "last"): "attn.o",
    }
    (core,) = (site for site in sites if site.kind == "attention")
    assert core.facts["kind"] == "self"
    report = ps.apply(graph, "lora_qv").report
    assert [match["parameter"] for match in report.matches] == ["value.weight"]
    assert [entry["roles"] for entry in report.to_dict()["elsewhere"]] == [{"attn.q": "experts"}]
    assert "has experts for attn.q, which this rule does not match" in str(report)
    assert len(ps.apply(graph, "lora_experts").report.matches) == 2
    strict = ps.parse_rules(STRICT)
    with pytest.raises(SurgeryError, match="PSG302"):
        ps.apply(graph, strict)


STRICT = """
name: strict
about: Every core is to have linears.
rules:
  - match: linear
    where: {role: [attn.q, attn.v]}
    expect: {per_attention: 2, complete: true}
    rewrite: 2 * y
"""


@pytest.mark.slow
def test_jetmoe() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}
    build = hf(
        "JetMoeModel",
        "JetMoeConfig",
        **sizes,
        vocab_size=99,
        num_key_value_heads=2,
        num_attention_heads=4,
        kv_channels=8,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    graph = ps.capture(build())
    start = "layers.0.self_attention."
    sites = [s for s in survey(graph.base_capture) if s.module.startswith(start)]
    found = {(s.module.removeprefix(start), s.site.label): s.role for s in sites if s.role}
    assert found == {
        ("experts.router.layer", None): "moe.router",
        ("experts.input_linear", None): "attn.q",
        ("kv_proj", None): "attn.kv",
        ("kv_proj", "k"): "attn.k",
        ("kv_proj", "v"): "attn.v",
        ("experts.output_linear", None): "attn.o",
    }
    assert len(ps.apply(graph, "lora_qv").report.matches) == 1


def test_convolutions_in_groups_are_projections_and_no_linears() -> None:
    torch.manual_seed(0)
    build = hf(
        "SqueezeBertForMaskedLM",
        "SqueezeBertConfig",
        vocab_size=99,
        hidden_size=32,
        embedding_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
    )
    graph = ps.capture(build())
    start = "transformer.encoder.layers.0."
    found = {
        (s.kind, s.module.removeprefix(start)): s.role
        for s in survey(graph.base_capture)
        if s.module.startswith(start) and s.role
    }
    assert found == {
        ("conv", "attention.query"): "attn.q",
        ("conv", "attention.key"): "attn.k",
        ("conv", "attention.value"): "attn.v",
        ("linear", "post_attention.conv1d"): "attn.o",
        ("conv", "intermediate.conv1d"): "ffn.up",
        ("conv", "output.conv1d"): "ffn.down",
    }
    with pytest.raises(SurgeryError, match=r"has 0; attn\.q is of conv; attn\.v is of conv"):
        ps.apply(graph, "lora_qv")
    changed = ps.parse_rules(GROUPED)
    assert len(ps.apply(graph, changed).report.matches) == 2


GROUPED = """
name: grouped
about: Queries and values of convolutions are scaled.
rules:
  - match: conv
    where: {role: [attn.q, attn.v]}
    params: {s: {shape: [out, 1], init: ones}}
    rewrite: y * s
"""
