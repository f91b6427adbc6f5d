"""A change at one reader of a weight is folded only if nothing else reads the weight."""

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery import SurgeryError


class Read(nn.Module):
    """A linear whose weight is read a second time in the way given."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner, self.way = nn.Linear(6, 6), way

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.inner(x))
        if self.way == "sum":
            return y + self.inner.weight.square().sum()
        if self.way == "einsum":
            return y + torch.einsum("oi,bti->bto", self.inner.weight * 2, x)
        if self.way == "turned":
            return y * self.inner.weight.t().reshape(-1).mean()
        if self.way == "again":
            return torch.tanh(self.inner(y))
        return y.to(self.inner.weight.dtype)


def operated(way: str) -> ps.OperatedModel:
    torch.manual_seed(0)
    model = ps.capture(Read(way).eval(), inputs={"x": torch.randn(2, 3, 6)})
    return ps.apply(
        model,
        ps.parse_rules("""
name: low
with: {rank: 2}
rules:
  - match: linear
    where: {op: linear}
    params:
      A: {shape: [rank, in], init: normal(0.5)}
      B: {shape: [out, rank], init: normal(0.5)}
    rewrite: y + linear(linear(x, A), B)
    fold: W + B @ A
"""),
    )


@pytest.mark.parametrize("way", ["sum", "einsum", "turned"])
def test_a_weight_that_something_else_reads_is_not_folded_into(way: str) -> None:
    with pytest.raises(SurgeryError, match=r"PSG408.*'inner.weight'"):
        ps.fold(operated(way))


@pytest.mark.parametrize("way", ["again", "dtype only"])
def test_a_weight_all_of_whose_readers_are_changed_is_folded_into(way: str) -> None:
    made, x = operated(way), torch.randn(2, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(ps.fold(made)(x), made(x), atol=1e-6, rtol=0)
