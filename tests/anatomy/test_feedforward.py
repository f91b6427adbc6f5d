"""Feed-forwards, however they are written: their linears by role, as the module's names say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftsurgery as ps
from peftsurgery.anatomy import survey


class Feed(nn.Module):
    """A residual branch of linears called by their roles, and a head behind it."""

    def __init__(self, branch: Callable[[Feed, Tensor], Tensor]) -> None:
        super().__init__()
        self.branch = branch
        self.gate, self.up = nn.Linear(8, 12), nn.Linear(8, 12)
        self.both, self.down = nn.Linear(8, 24), nn.Linear(12, 8)
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
