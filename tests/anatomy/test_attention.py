"""Attention cores that read one tensor as two or three of their operands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftsurgery as ps
from peftsurgery.anatomy import survey

HEADS, WIDTH, LENGTH = 2, 8, 3
PREFIX = """
name: prefixed
rules:
  - match: attention
    params:
      K: {shape: [3, kv_heads, head_dim], init: normal(0.5)}
      V: {shape: [3, kv_heads, head_dim], init: normal(0.5)}
    rewrite: attention(q, concat(tokens(K), k), concat(tokens(V), v), extend(mask, 3))
"""
Core = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask)


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, -1) @ v


class Shared(nn.Module):
    """Attention of one projection to another (or to itself) whose keys are its values too."""

    def __init__(self, core: Core, projections: int, masked: bool, repeated: bool = False) -> None:
        super().__init__()
        self.core, self.masked, self.repeated = core, masked, repeated
        shared = WIDTH // HEADS if repeated else WIDTH
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, shared) if projections == 2 else self.first
        self.last = nn.Linear(WIDTH, WIDTH)

    def heads(self, x: Tensor) -> Tensor:
        split = x.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
        return split.expand(-1, HEADS, -1, -1).reshape(len(x), HEADS, -1, WIDTH // HEADS)

    def forward(self, x: Tensor, K: Tensor | None = None, V: Tensor | None = None) -> Tensor:
        q = self.first(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k = v = q if self.second is self.first else self.heads(self.second(x))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() if self.masked else None
        if K is not None and V is not None:
            k, v = (
                torch.cat([P.transpose(0, 1).expand(len(x), -1, -1, -1), t], 2)
                for P, t in ((K, k), (V, v))
            )
            mask = mask if mask is None else F.pad(mask, (LENGTH, 0), value=True)
        y: Tensor = self.last(self.core(q, k, v, mask).transpose(1, 2).flatten(2))
        return y


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("core", [fused, by_hand])
def test_keys_that_are_the_values_are_two_operands(
    core: Core, repeated: bool, masked: bool
) -> None:
    model, x = Shared(core, 2, masked, repeated), torch.randn(2, 5, WIDTH)
    operated = ps.apply(ps.capture(model, {"x": x}), ps.parse_rules(PREFIX))
    K, V = (operated.get_parameter(n) for n in sorted(operated.learnt()))
    with torch.no_grad():
        torch.testing.assert_close(operated(x), model(x, K, V), rtol=0, atol=1e-6)
    (site,) = [site for site in survey(operated.base_capture) if site.kind == "attention"]
    assert (site.facts["heads"], "mask" in site.site.nodes) == (HEADS, masked)


@pytest.mark.parametrize("masked", [False, True])
def test_queries_that_are_keys_and_values_are_three_operands(masked: bool) -> None:
    model, x = Shared(fused, 1, masked), torch.randn(2, 5, WIDTH)
    operated = ps.apply(ps.capture(model, {"x": x}), ps.parse_rules(PREFIX))
    K, V = (operated.get_parameter(n) for n in sorted(operated.learnt()))
    with torch.no_grad():
        torch.testing.assert_close(operated(x), model(x, K, V), rtol=0, atol=1e-6)


def test_a_core_that_cannot_be_read_is_left_unread_and_named() -> None:
    model, x = Shared(by_hand, 1, masked=True), torch.randn(2, 5, WIDTH)
    operated = ps.apply(ps.capture(model, {"x": x}), "lora_all_linear")
    assert not [site for site in survey(operated.base_capture) if site.kind == "attention"]
    assert any("attention" in note for note in operated.report.to_dict()["notes"])


class Bare(nn.Module):
    """Attention with no projection at all, to vectors without heads."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(F.scaled_dot_product_attention(x[0], x[0], x[0]) + x)
        return y


def test_no_core_keeps_other_rules_from_a_model() -> None:
    operated = ps.apply(ps.capture(Bare(), {"x": torch.randn(2, 5, WIDTH)}), "lora_all_linear")
    assert [match["module"] for match in operated.report.matches] == ["last"]
