"""Attention whose queries are pooled between their projection and the core."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.anatomy import survey

WIDTH, HEADS = 8, 2
Pool = Callable[[Tensor], Tensor]


class Pooled(nn.Module):
    """Attention of a fused projection, each query made of two neighbouring tokens' queries."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool
        self.one, self.two = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.one(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = fused.unbind(0)
        q = self.pool(q.unflatten(2, (2, -1)))
        made = torch.softmax(q @ k.mT * 0.5, -1) @ v
        result: Tensor = self.two(made.transpose(1, 2).flatten(2))
        return result


@pytest.mark.parametrize("pool", [lambda q: q.max(2).values, lambda q: q.mean(2)])
def test_pooled_queries_have_the_rows_of_their_projection(pool: Pool) -> None:
    torch.manual_seed(0)
    model, x = Pooled(pool).eval(), torch.randn(2, 6, WIDTH)
    graph = ps.capture(model, {"x": x})
    linears = [site for site in survey(graph.base_capture) if site.kind == "linear"]
    rows = [list(range(start, start + WIDTH)) for start in (0, WIDTH, 2 * WIDTH)]
    assert {s.role: (s.module, s.slice and s.slice.indices()) for s in linears} == {
        "attn.qkv": ("one", None),
        "attn.q": ("one", rows[0]),
        "attn.k": ("one", rows[1]),
        "attn.v": ("one", rows[2]),
        "attn.o": ("two", None),
    }
    assert len(ps.apply(graph, "lora_qv").report.matches) == 2
