"""Feed-forwards, however they are written: their linears by role, as the module's names say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftsurgery as ps
from peftsurgery.anatomy import survey
from tests.models.zoo import hf


class Feed(nn.Module):
    """A residual branch of linears called by their roles, and a head behind it."""

    def __init__(self, branch: Callable[[Feed, Tensor], Tensor]) -> None:
        super().__init__()
        self.branch = branch
        self.gate, self.up = nn.Linear(8, 12), nn.Linear(8, 12)
        self.both, self.down = nn.Linear(8, 24), nn.Linear(12, 8)
        self.wanted = nn.Linear(8, 1)
        self.pooler, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(x)
        x = x + self.branch(self, x)
        return self.head(torch.tanh(self.pooler(x)))


def halves(feed: Feed, x: Tensor) -> Tensor:
    up, gate = feed.both(x).chunk(2, -1)
    return feed.down(F.gelu(gate) * up)


BRANCHES: dict[str, tuple[Callable[[Feed, Tensor], Tensor], dict[str, set[str]]]] = {
    "plain": (
        lambda feed, x: feed.down(F.relu(feed.up(x))),
        {"ffn.up": {"up"}, "ffn.down": {"down"}},
    ),
    "gated": (
        lambda feed, x: feed.down(F.silu(feed.gate(x)) * feed.up(x)),
        {"ffn.gate": {"gate"}, "ffn.up": {"up"}, "ffn.down": {"down"}},
    ),
    "gated, the gate last": (
        lambda feed, x: feed.down(feed.up(x) * torch.sigmoid(feed.gate(x))),
        {"ffn.gate": {"gate"}, "ffn.up": {"up"}, "ffn.down": {"down"}},
    ),
    "both in one": (
        halves,
        {
            "ffn.gate_up": {"both"},
            "ffn.gate": {"both[gate]"},
            "ffn.up": {"both[up]"},
            "ffn.down": {"down"},
        },
    ),
    "as much as each token wants": (
        lambda feed, x: (
            torch.sigmoid(feed.wanted(x)) * feed.down(F.silu(feed.gate(x)) * feed.up(x))
        ),
        {"ffn.gate": {"gate"}, "ffn.up": {"up"}, "ffn.down": {"down"}},
    ),
    "glu": (
        lambda feed, x: feed.down(F.glu(feed.both(x), -1)),
        {
            "ffn.gate_up": {"both"},
            "ffn.gate": {"both[gate]"},
            "ffn.up": {"both[up]"},
            "ffn.down": {"down"},
        },
    ),
    "no activation": (lambda feed, x: feed.down(feed.up(x)), {}),
    "tokens mixed": (lambda feed, x: feed.down((x @ x.mT) @ F.relu(feed.up(x))), {}),
}


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_branch_has_the_roles_that_its_linears_are_called_by(branch: str) -> None:
    body, expected = BRANCHES[branch]
    graph = ps.capture(Feed(body), {"x": torch.randn(2, 5, 8)})
    found: dict[str, set[str]] = {}
    for site in survey(graph.base_capture):
        if site.kind == "linear" and str(site.role).startswith("ffn"):
            label = f"[{site.site.label}]" if site.site.label else ""
            found.setdefault(str(site.role), set()).add(f"{site.module}{label}")
    assert found == expected


def test_the_halves_of_one_weight_are_the_rows_that_the_module_splits() -> None:
    graph = ps.capture(Feed(halves), {"x": torch.randn(2, 5, 8)})
    parts = {s.site.label: s.slice for s in survey(graph.base_capture) if s.slice is not None}
    assert {name: part.indices() for name, part in parts.items() if part is not None} == {
        "up": list(range(12)),
        "gate": list(range(12, 24)),
    }


EXPERTS = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
SHARED = {
    "qwen2_moe": hf("Qwen2MoeModel", "Qwen2MoeConfig", **EXPERTS),
    "qwen3_next": hf(
        "Qwen3NextModel",
        "Qwen3NextConfig",
        **EXPERTS,
        decoder_sparse_step=1,
        layer_types=["full_attention"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_a_shared_expert_is_a_feed_forward_beside_those_that_are_chosen(name: str) -> None:
    torch.manual_seed(0)
    sites = survey(ps.capture(SHARED[name]().eval()).captures[0])
    products = [site for site in sites if site.kind in ("linear", "experts")]
    found = {site.parameter: site.role for site in products if ".mlp" in site.module}
    assert found == {
        "layers.0.mlp.gate.weight": "moe.router",
        "layers.0.mlp.experts.gate_up_proj": "ffn.gate_up",
        "layers.0.mlp.experts.down_proj": "ffn.down",
        "layers.0.mlp.shared_expert.gate_proj.weight": "ffn.gate",
        "layers.0.mlp.shared_expert.up_proj.weight": "ffn.up",
        "layers.0.mlp.shared_expert.down_proj.weight": "ffn.down",
        "layers.0.mlp.shared_expert_gate.weight": None,
    }
