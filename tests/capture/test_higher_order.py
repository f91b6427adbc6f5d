"""Regions that torch.export keeps apart are inlined, and their gradients and dtypes stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps


class Frozen(nn.Module):
    """A product of which one factor is computed without gradient, and written into or not."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes, self.W = writes, nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = torch.sin(x @ self.W)
            if self.writes:
                scale.add_(1)
            with torch.enable_grad():
                again = x * self.W.sum()
        return x @ self.W * scale + again


class Halved(nn.Module):
    """A product under autocast between two in full precision."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = self.first(x)
            assert y.dtype == torch.bfloat16
        return self.last(y.float())


@pytest.mark.parametrize("module", [Frozen(False), Frozen(True), Halved()], ids=str)
def test_a_region_gives_the_original_s_values_and_gradients(module: nn.Module) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    graph = ps.capture(module, {"x": torch.randn(2, 4)})
    kept = [n for n in graph.base_capture.top.graph.nodes if "higher_order" in str(n.target)]
    assert kept == []
    given = [x, *module.parameters()]
    found, expected = graph(x), module(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    mine = torch.autograd.grad(found.sum(), [x, *graph.parameters()])
    theirs = torch.autograd.grad(expected.sum(), given)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


class Chosen(nn.Module):
    """A branch that a value decides."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))
        return found


class Mapped(nn.Module):
    """A function that torch maps over a batch."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.vmap(lambda row: row.sin().cumsum(0))(x)
        return found


@pytest.mark.parametrize("module", [Chosen(), Mapped()], ids=["cond", "vmap"])
def test_a_region_that_is_no_straight_line_is_refused(module: nn.Module) -> None:
    with pytest.raises(ps.SurgeryError, match="PSG201"):
        ps.capture(module, {"x": torch.randn(2, 4)})
