"""What stands between a projection and attention, by tables written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftsurgery as ps
from peftsurgery.anatomy import survey


class Between(nn.Module):
    """Attention of two heads, with something done to queries, keys or values on their way."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(16, 16) for _ in range(5))
        self.share = nn.Parameter(torch.tensor(0.3))
        self.table = nn.Embedding(9, 16)
        self.short = nn.Conv1d(16, 16, 3, groups=16, padding=2)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = self.a(y), self.b(y), self.c(y)
        if self.kind == "values of the first layer":
            v = (1 - self.share) * v + self.share * first
        elif self.kind == "embedded values":
            v = v + self.table(torch.arange(x.shape[1]) % 9)
        elif self.kind == "two projections to queries":
            q = q + self.e(first)
        elif self.kind == "short convolutions":
            q, k, v = (self._short(part) for part in (q, k, v))
        elif self.kind == "keys as they are":
            k = y
        elif self.kind == "keys that are values":
            v = self.norm(k)
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        z: Tensor = x + self.d(o)
        return z

    def _short(self, part: Tensor) -> Tensor:
        return F.silu(self.short(part.transpose(1, 2))[..., : part.shape[1]]).transpose(1, 2)


PLAIN = {"a": "attn.q", "b": "attn.k", "c": "attn.v", "d": "attn.o"}
TABLES: dict[str, dict[str, str | None]] = {
    "values of the first layer": PLAIN,
    "embedded values": PLAIN,
    "two projections to queries": {**PLAIN, "e": "attn.q"},
    "short convolutions": PLAIN,
    "keys as they are": {**PLAIN, "b": None},
    "keys that are values": {"a": "attn.q", "b": "attn.kv", "d": "attn.o"},
}


@pytest.mark.parametrize("kind", TABLES)
def test_projections_have_their_roles_whatever_is_between(kind: str) -> None:
    torch.manual_seed(0)
    model, x, first = Between(kind), torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    graph = ps.capture(model, {"x": x, "first": first})
    linears = [site for site in survey(graph.base_capture) if site.kind == "linear"]
    found = {site.module: site.role for site in linears}
    assert found == {name: role for name, role in TABLES[kind].items() if name in found}
    assert TABLES[kind].keys() - found.keys() <= {"b"}  # what is not used is not there
    operated = ps.apply(graph, "lora_qv", rank=2)
    adapted = {match["module"] for match in operated.report.matches}
    assert adapted == {name for name, role in found.items() if role in ("attn.q", "attn.v")}
    for parameter in operated.learnt().values():
        nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        torch.testing.assert_close(
            ps.fold(operated)(x, first), operated(x, first), rtol=0, atol=1e-5
        )


def test_a_rule_for_values_is_told_that_they_are_keys_too() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    graph = ps.capture(Between("keys that are values").eval(), {"x": x, "first": x})
    report = ps.apply(graph, "lora_qv").report
    assert [match["module"] for match in report.matches] == ["a"]
    assert [entry["roles"] for entry in report.to_dict()["unprojected"]] == [["attn.v"]]
    assert report.to_dict()["coverage"]["attn.kv"] == {"matched": 0, "of": 1}


class Averaged(nn.Module):
    """Queries of four heads and keys of two, mixed by groups, each with some of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.d = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b, self.c = nn.Linear(16, 8), nn.Linear(16, 8)
        self.mix = nn.Conv1d(24, 24, 2, groups=6)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        both = nn.functional.pad(torch.cat((a, b), -1).transpose(1, 2), (1, 0))
        both = self.mix(both).transpose(1, 2).unflatten(-1, (6, 4))
        mean = a.unflatten(-1, (2, 2, 4)) + b.unflatten(-1, (2, 1, 4))
        q, k = both[:, :, :4] + mean.flatten(2, 3), both[:, :, 4:] + mean.mean(3)
        v = self.c(x).unflatten(-1, (2, 4))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        k, v = (part.repeat_interleave(2, 1) for part in (k, v))
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        z: Tensor = x + self.d(o)
        return z


def test_queries_are_of_the_linear_whose_rows_none_shares_there_nor_averages() -> None:
    torch.manual_seed(0)
    graph = ps.capture(Averaged().eval(), {"x": torch.randn(2, 5, 16)})
    sites = survey(graph.base_capture)
    assert {s.module: s.role for s in sites if s.kind == "linear"} == PLAIN
    (core,) = (site for site in sites if site.kind == "attention")
    assert (core.facts["kind"], core.facts["heads"], core.facts["kv_heads"]) == ("self", 4, 2)
    assert len(ps.apply(graph, "lora_qv").report.matches) == 2
