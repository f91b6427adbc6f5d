"""What the result of attention is multiplied with is a gate, by tables written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftsurgery as ps
from peftsurgery.anatomy import survey


class Gated(nn.Module):
    """Attention of two heads whose result is gated, by rows of the query's weight or by its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a = nn.Linear(16, 32 if kind == "with queries" else 16)
        self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(3))
        self.e = nn.Linear(16, 2 if kind == "of heads" else 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.a(x).unflatten(-1, (2, -1))
        q, z = heads[..., :8], heads[..., 8:].flatten(2)
        k, v = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.b, self.c))
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)
        if self.kind == "of heads":
            o = o * torch.sigmoid(self.e(x))[..., None]
        o = o.flatten(2)
        if self.kind == "with queries":
            o = o * torch.sigmoid(z)
        elif self.kind == "of its own":
            o = self.norm(o) * F.silu(self.e(x))
        elif self.kind == "no gate":
            o = o * self.e(x)
        y: Tensor = x + self.d(o)
        return y


PLAIN = {"b": "attn.k", "c": "attn.v", "d": "attn.o"}
TABLES: dict[str, dict[str, str | None]] = {
    "with queries": {"a": "attn.q_gate", "a.q": "attn.q", "a.gate": "attn.gate", **PLAIN},
    "of its own": {"a": "attn.q", "e": "attn.gate", **PLAIN},
    "of heads": {"a": "attn.q", "e": "attn.gate", **PLAIN},
}


def roles(graph: ps.GraphModel) -> dict[str, str | None]:
    linears = (site for site in survey(graph.base_capture) if site.kind == "linear")
    return {".".join(filter(None, (s.module, s.site.label))): s.role for s in linears}


@pytest.mark.parametrize("kind", TABLES)
def test_a_gate_is_told_from_queries(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Gated(kind), torch.randn(2, 5, 16)
    graph = ps.capture(model, {"x": x})
    assert roles(graph) == TABLES[kind]
    kinds = {s.facts.get("kind") for s in survey(graph.base_capture) if s.kind == "linear"}
    assert kinds == {"self"}


def test_a_rule_for_queries_leaves_the_gate_alone() -> None:
    torch.manual_seed(0)
    model, x = Gated("with queries"), torch.randn(2, 5, 16)
    operated = ps.apply(ps.capture(model, {"x": x}), "lora_qv", rank=2, alpha=2)
    assert [match["role"] for match in operated.report.matches] == ["attn.q", "attn.v"]
    for parameter in operated.learnt().values():
        nn.init.normal_(parameter)
    with torch.no_grad():
        folded = ps.fold(operated)
        torch.testing.assert_close(folded(x), operated(x), rtol=0, atol=1e-5)
        change = (folded.a.weight - model.a.weight).unflatten(0, (2, 2, 8))
        assert torch.equal(change[:, 1], torch.zeros(2, 8, 16))
        assert change[:, 0].abs().amin(dim=(0, 1)).gt(0).all()


def test_what_is_not_activated_is_no_gate() -> None:
    assert roles(ps.capture(Gated("no gate"), {"x": torch.randn(2, 5, 16)}))["e"] is None
