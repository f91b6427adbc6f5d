"""Attention without a softmax: roles by tables written from the code that is here, or MiniMax's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftsurgery as ps
from peftsurgery.anatomy import survey
from peftsurgery.errors import SurgeryError
from tests.models.zoo import GROUPED, hf

D = 8
Mixer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def decaying(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """Scores that fade with distance meet values (batch, heads, tokens, features)."""
    far = torch.arange(q.shape[-2])
    fading = torch.exp(-decay * (far[:, None] - far).clamp(min=0)) * (far[:, None] >= far)
    return (q @ k.mT * fading) @ v


def added(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """The same, and what a memory of all tokens says."""
    return decaying(q, k, v, decay) + (q * decay) @ (k.mT @ v)


def by_einsum(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """Scores and values by einsum."""
    scores = torch.einsum("bhtd,bhsd->bhts", torch.relu(q), torch.relu(k)) * decay
    return torch.einsum("bhts,bhsd->bhtd", scores, v)


def by_angles(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """How likely the hashes of a query and of a key agree, by the angle between them."""
    cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    return ((1 - torch.acos(cosines) / torch.pi) ** 9 * decay) @ v


def by_relu(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """Scores that are zero below a threshold, squared."""
    return torch.square(torch.relu(q @ k.mT + decay)) @ v


class Linear(nn.Module):
    """Linear attention of two heads, whose result is gated."""

    def __init__(self, mix: Mixer) -> None:
        super().__init__()
        self.mix = mix
        self.one, self.two, self.three, self.four, self.last = (nn.Linear(D, D) for _ in range(5))
        self.decay = nn.Parameter(torch.rand(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (2, 4)).transpose(1, 2)
            for part in (self.one, self.two, self.three)
        )
        mixed = self.mix(F.silu(q), k, v, self.decay).transpose(1, 2).flatten(2)
        result: Tensor = x + self.last(torch.sigmoid(self.four(x)) * mixed)
        return result


@pytest.mark.parametrize("mix", [decaying, added, by_einsum, by_angles, by_relu])
def test_projections_have_their_roles_and_are_adapted(mix: Mixer) -> None:
    torch.manual_seed(0)
    model = Linear(mix).eval()
    graph = ps.capture(model, {"x": torch.randn(2, 5, D)})
    linears = [site for site in survey(graph.base_capture) if site.kind == "linear"]
    assert {site.role: site.module for site in linears} == {
        "attn.q": "one",
        "attn.k": "two",
        "attn.v": "three",
        "attn.gate": "four",
        "attn.o": "last",
    }
    assert {site.facts["kind"] for site in linears} == {"linear"}
    report = ps.apply(graph, "lora_qv").report
    assert [match["module"] for match in report.matches] == ["one", "three"]


class Separable(nn.Module):
    """One score for each token weighs keys, whose sum multiplies values."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(D, 1 + 2 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.one(x).split([1, D, D], dim=-1)
        told = (k * torch.softmax(q, dim=1)).sum(dim=1, keepdim=True)
        result: Tensor = x + self.two(torch.relu(v) * told.expand_as(v))
        return result


def test_one_score_for_each_token_is_a_query() -> None:
    graph = ps.capture(Separable().eval(), {"x": torch.randn(2, 5, D)})
    linears = [site for site in survey(graph.base_capture) if site.kind == "linear"]
    assert {s.role: (s.module, s.slice and s.slice.indices()) for s in linears} == {
        "attn.qkv": ("one", None),
        "attn.q": ("one", [0]),
        "attn.k": ("one", list(range(1, 1 + D))),
        "attn.v": ("one", list(range(1 + D, 1 + 2 * D))),
        "attn.o": ("two", None),
    }
    assert len(ps.apply(graph, "lora_qv").report.matches) == 2


def test_a_rule_that_expects_more_roles_is_told() -> None:
    graph = ps.capture(Linear(decaying).eval(), {"x": torch.randn(2, 5, D)})
    rules = ps.parse_rules(
        "name: three\nabout: Three.\nrules:\n"
        "  - {match: linear, where: {role: [attn.q, attn.v]}, expect: {per_attention: 3},"
        " rewrite: 2 * y}"
    )
    with pytest.raises(SurgeryError, match="PSG302"):
        ps.apply(graph, rules)


class Bilinear(nn.Module):
    """Products of values that are no attention: one projection twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.one(x), self.two(x)
        result: Tensor = x + self.last((a @ b.mT) @ a)
        return result


def test_a_projection_that_would_be_queries_and_values_has_no_role_of_attention() -> None:
    graph = ps.capture(Bilinear().eval(), {"x": torch.randn(2, 5, D)})
    roles = [site.role for site in survey(graph.base_capture) if site.kind == "linear"]
    assert not any((role or "").startswith("attn") for role in roles)


@pytest.mark.slow
def test_minimax_interleaves_heads() -> None:
    torch.manual_seed(0)
    one = {**GROUPED, "num_hidden_layers": 1, "head_dim": 8, "num_local_experts": 2}
    model = hf("MiniMaxModel", "MiniMaxConfig", **one, layer_types=["linear_attention"])()
    sites = survey(ps.capture(model.eval()).base_capture)
    mine = [site for site in sites if site.kind == "linear" and "self_attn" in site.module]
    rows = torch.arange(96).reshape(4, 24)  # of each head queries, keys and values
    assert {s.role: s.slice and s.slice.indices() for s in mine} == {
        "attn.qkv": None,
        "attn.q": rows[:, :8].flatten().tolist(),
        "attn.k": rows[:, 8:16].flatten().tolist(),
        "attn.v": rows[:, 16:].flatten().tolist(),
        "attn.gate": None,
        "attn.o": None,
    }
