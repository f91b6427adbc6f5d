"""Norms, however they are spelled: what is sewn in behind one is done to what torch's own gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftsurgery as ps
from tests.anatomy.found import sites
from tests.models.captured import captured

RULE = "name: halved\nrules: [{match: norm, rewrite: 0.5 * y}]"


def root(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-4)


def rms(x: Tensor, scale: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], scale, 1e-4)


Norm = Callable[[Tensor, Tensor], Tensor]
SPELLINGS: dict[str, tuple[Norm, Norm]] = {
    "layer norm": (
        lambda x, W: F.layer_norm(x, (8,), W, eps=1e-4),
        lambda x, W: (x - x.mean(-1, True)) / (x.var(-1, False, keepdim=True) + 1e-4).sqrt() * W,
    ),
    "rms norm": (rms, lambda x, W: root(x) * W),
    "spelled": (lambda x, W: W * root(x), rms),
    "spelled, around one": (lambda x, W: root(x) * (1 + W), lambda x, W: rms(x, 1 + W)),
    "spelled, in another dtype": (
        lambda x, W: W * root(x.to(torch.float64)).to(torch.float32),
        rms,
    ),
    "spelled, without a scale": (lambda x, W: root(x) + W, lambda x, W: rms(x, W / W) + W),
}


class Spelled(nn.Module):
    """One norm between two activations."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm, self.W = norm, nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(torch.sin(x), self.W))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelled_norm_is_what_torch_calls_one(spelling: str) -> None:
    norm, other = SPELLINGS[spelling]
    module, x = Spelled(norm), torch.randn(2, 3, 8)
    operated = ps.apply(ps.capture(module, {"x": x}), ps.parse_rules(RULE))
    given = torch.sin(x)
    behind = 0.5 * other(given, module.W)
    if spelling.endswith("without a scale"):
        behind = behind + 0.5 * module.W  # what is added is no part of the norm
    with torch.no_grad():
        torch.testing.assert_close(operated(x), torch.tanh(behind), rtol=0, atol=1e-5)


def test_a_sum_of_squares_is_no_norm() -> None:
    module = Spelled(lambda x, W: W * torch.rsqrt(x.pow(2).sum(-1, keepdim=True)) * x)
    with pytest.raises(ps.SurgeryError, match="PSG301"):
        ps.apply(ps.capture(module, {"x": torch.randn(2, 3, 8)}), ps.parse_rules(RULE))


@pytest.mark.parametrize(
    ("name", "setting"),
    [("bert", "layer_norm_eps"), ("phi3", "rms_norm_eps"), ("gpt2", "layer_norm_epsilon")],
)
def test_the_eps_of_a_norm_is_that_of_the_config(name: str, setting: str) -> None:
    expected = getattr(captured(name).config, setting)
    assert {site.facts["eps"] for site in sites(name, "norm")} == {expected}
