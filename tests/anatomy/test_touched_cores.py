"""Attention whose probabilities are touched before they meet values, and kin of the softmax.

The tables say which module is what; prefixes are held to a torch computation of the same attention
with longer keys and values.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftsurgery as ps
from peftsurgery.anatomy import survey

Weighing = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Scores, which keys are seen, and a number for each head: what values are multiplied with."""
LOW = torch.finfo(torch.float32).min


def soft(s: Tensor, seen: Tensor) -> Tensor:
    return s.masked_fill(~seen, LOW).softmax(-1)


def exponential(s: Tensor, seen: Tensor) -> Tensor:
    s = s.masked_fill(~seen, -1e9)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def renormalised(p: Tensor) -> Tensor:
    return p / (p.sum(-1, keepdim=True) + 1e-6)


def with_sink(s: Tensor, seen: Tensor, sink: Tensor) -> Tensor:
    added = sink[None, :, None, None].expand(s.shape[0], -1, s.shape[2], 1)
    return torch.cat([s.masked_fill(~seen, LOW), added], -1).softmax(-1)[..., :-1]


KINDS: dict[str, Weighing] = {
    "filled": lambda s, seen, g: soft(s, seen).masked_fill(~seen, 0.0),
    "chosen": lambda s, seen, g: torch.where(seen, soft(s, seen), 0.0),
    "multiplied": lambda s, seen, g: soft(s, seen) * seen,
    "made numbers": lambda s, seen, g: torch.nan_to_num(
        s.masked_fill(~seen, float("-inf")).softmax(-1)
    ),
    "renormalised": lambda s, seen, g: renormalised(soft(s, seen) * seen),
    "gated heads": lambda s, seen, g: soft(s, seen) * g[:, None, None],
    "a sink": with_sink,
    "exponentials": lambda s, seen, g: exponential(s, seen),
    "sigmoid": lambda s, seen, g: torch.sigmoid(s) * seen,
}


class Attending(nn.Module):
    """Causal attention of two heads, with a prefix of keys and values if it is given one."""

    def __init__(self, weighing: Weighing) -> None:
        super().__init__()
        self.weighing = weighing
        self.one, self.two, self.three, self.four = (nn.Linear(16, 16) for _ in range(4))
        self.numbers = nn.Parameter(torch.rand(2))

    def forward(
        self, x: Tensor, mask: Tensor, keys: Tensor | None = None, values: Tensor | None = None
    ) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (2, 8)).transpose(1, 2)
            for part in (self.one, self.two, self.three)
        )
        count = x.shape[1]
        seen = torch.ones(count, count, dtype=torch.bool).tril() & mask[:, None, None]
        if keys is not None and values is not None:
            seen = F.pad(seen, (keys.shape[2], 0), value=True)
            k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        p = self.weighing(q @ k.transpose(-1, -2) * 8**-0.5, seen, self.numbers)
        y: Tensor = x + self.four((p @ v).transpose(1, 2).flatten(2))
        return y


@pytest.mark.parametrize("name", KINDS)
def test_a_core_is_found_whatever_is_done_to_its_probabilities(name: str) -> None:
    torch.manual_seed(0)
    model, x = Attending(KINDS[name]), torch.randn(2, 5, 16)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, :2] = False
    graph = ps.capture(model, {"x": x, "mask": mask})
    sites = survey(graph.base_capture)
    roles = {site.module: site.role for site in sites if site.kind == "linear"}
    assert roles == {"one": "attn.q", "two": "attn.k", "three": "attn.v", "four": "attn.o"}
    (core,) = (site for site in sites if site.kind == "attention")
    assert (core.facts["causal"], core.facts["kind"], core.facts["heads"]) == (True, "self", 2)
    operated = ps.apply(graph, "prefix_tuning", length=2)
    K, V = (operated.learnt()[key] for key in sorted(operated.learnt()))
    with torch.no_grad():
        K.normal_()
        V.normal_()
        keys, values = (each.transpose(0, 1).expand(2, -1, -1, -1) for each in (K, V))
        expected = model(x, mask, keys, values)
        torch.testing.assert_close(operated(x, mask), expected, rtol=0, atol=1e-5)
        assert not torch.allclose(expected, model(x, mask), atol=1e-3)
