"""Sums over named axes are products of matrices: the same to the last bit, and adapted as linears.

The oracle is torch: the module as it is, and one with the low-rank product added to its weight by
hand, in the axes that the weight is stored in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.anatomy import survey

H, N, D = 6, 2, 3


@dataclass(frozen=True)
class Layer:
    """What a layer computes of x (batch, tokens, H), the weight's shape, and how B A is stored."""

    run: Callable[[Tensor, Tensor], Tensor]
    shape: tuple[int, ...]
    stored: Callable[[Tensor], Tensor]  # of (out, in)


def summed(equation: str, axes: str = "bth") -> Callable[[Tensor, Tensor], Tensor]:
    """An einsum of x, whose axes the equation has in another order than (b, t, h)."""
    return lambda x, W: torch.einsum(equation, x.permute(*map("bth".index, axes)), W)


def headed(x: Tensor) -> Tensor:
    """Vectors (..., H) as N heads of D."""
    return x.unflatten(-1, (N, D))


LAYERS = {
    "heads out, as XLNet": Layer(
        summed("ibh,hnd->ibnd", "tbh"), (H, N, D), lambda C: C.mT.reshape(H, N, D)
    ),
    "heads out, before tokens": Layer(
        summed("bth,hnd->bntd"), (H, N, D), lambda C: C.mT.reshape(H, N, D)
    ),
    "heads out, the weight's before what it reads": Layer(
        summed("bth,nhd->btnd"), (N, H, D), lambda C: C.reshape(N, D, H).mT
    ),
    "heads out, in the other order": Layer(
        summed("bth,hnd->btdn"), (H, N, D), lambda C: C.reshape(D, N, H).permute(2, 1, 0)
    ),
    "heads in": Layer(
        lambda x, W: torch.einsum("btnd,ndh->bth", headed(x), W),
        (N, D, H),
        lambda C: C.mT.reshape(D, N, H).permute(1, 0, 2),  # einsum sums d before n
    ),
    "heads in, as XLNet": Layer(
        lambda x, W: torch.einsum("ibnd,hnd->ibh", headed(x.transpose(0, 1)), W),
        (H, N, D),
        lambda C: C.reshape(H, D, N).mT,
    ),
    "heads in and out": Layer(
        lambda x, W: torch.einsum("btnd,ndpq->btpq", headed(x), W),
        (N, D, N, D),
        lambda C: C.mT.reshape(D, N, N, D).permute(1, 0, 2, 3),
    ),
    "the weight first": Layer(
        lambda x, W: torch.einsum("hnd,bth->btnd", W, x),
        (H, N, D),
        lambda C: C.mT.reshape(H, N, D),
    ),
    "dots": Layer(summed("...h,hnd->...nd"), (H, N, D), lambda C: C.mT.reshape(H, N, D)),
    "dots between": Layer(summed("b...h,hnd->nb...d"), (H, N, D), lambda C: C.mT.reshape(H, N, D)),
    "columns of an image": Layer(
        lambda x, W: torch.einsum("bchw,oc->bohw", x.mT.unsqueeze(-1), W), (H, H), lambda C: C
    ),
    "tensordot": Layer(
        lambda x, W: torch.tensordot(x, W, 1), (H, N, D), lambda C: C.mT.reshape(H, N, D)
    ),
    "tensordot over heads": Layer(
        lambda x, W: torch.tensordot(headed(x), W, ([3, 2], [2, 1])),
        (H, N, D),
        lambda C: C.reshape(H, D, N).mT,
    ),
}


class One(nn.Module):
    """One such layer, whose weight may be changed on its way."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        self.W = nn.Parameter(torch.randn(layer.shape))

    def forward(self, x: Tensor, change: Tensor | None = None) -> Tensor:
        weight = self.W if change is None else self.W + self.layer.stored(change)
        return torch.tanh(self.layer.run(torch.sin(x), weight))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_capture_is_the_same_to_the_last_bit(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = One(LAYERS[name]).to(dtype)
    graph = ps.capture(model, {"x": torch.randn(2, 5, H, dtype=dtype)})
    for batch, tokens in ((2, 5), (3, 17), (1, 4), (4, 1)):
        x = torch.randn(batch, tokens, H, dtype=dtype)
        assert torch.equal(graph(x), model(x))


@pytest.mark.parametrize("name", LAYERS)
def test_it_is_a_linear_that_trains_and_folds(name: str) -> None:
    torch.manual_seed(0)
    model = One(LAYERS[name]).double()
    graph = ps.capture(model, {"x": torch.randn(2, 5, H).double()})
    operated = ps.apply(graph, "lora_all_linear", rank=2, alpha=2)
    assert [match["parameter"] for match in operated.report.matches] == ["W"]
    A, B = (operated.get_parameter(name) for name in sorted(operated.report.added))
    nn.init.normal_(B)
    x = torch.randn(3, 4, H).double()
    free = [p.detach().double().requires_grad_() for p in (A, B)]
    expected = model(x, free[1] @ free[0])
    torch.testing.assert_close(operated(x=x), expected, rtol=0, atol=1e-12)
    expected.square().sum().backward()
    operated(x=x).square().sum().backward()
    for mine, other in zip((A, B), free, strict=True):
        torch.testing.assert_close(mine.grad, other.grad.to(mine.dtype), rtol=1e-5, atol=1e-5)
    folded = ps.fold(operated)
    stored = model.W + model.layer.stored(free[1] @ free[0])
    torch.testing.assert_close(folded.get_parameter("W"), stored, rtol=0, atol=1e-12)
    assert torch.equal(ps.eject(operated)(x), model(x))


CORES = {
    "as XLNet": ("ibnd,jbnd->bnij", "bnij,jbnd->ibnd", "tbnd"),
    "batch first": ("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", "btnd"),
    "heads first": ("bhqd,bhkd->bhqk", "bhqk,bhkd->bhqd", "bntd"),
}


class Attention(nn.Module):
    """Attention by einsum, with its axes in some order."""

    def __init__(self, scores: str, mixed: str, order: str) -> None:
        super().__init__()
        self.equations = scores, mixed
        self.order = ["btnd".index(axis) for axis in order]
        self.back = [order.index(axis) for axis in "btnd"]
        self.one, self.two, self.three, self.last = (nn.Linear(H, H) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (headed(part(x)).permute(self.order) for part in (self.one, self.two, self.three))
        scores = torch.einsum(self.equations[0], q, k)
        mixed = torch.einsum(self.equations[1], scores.softmax(-1), v)
        result: Tensor = x + self.last(mixed.permute(self.back).flatten(2))
        return result


@pytest.mark.parametrize("name", CORES)
def test_attention_is_found_in_any_order_of_axes(name: str) -> None:
    torch.manual_seed(0)
    model = Attention(*CORES[name])
    graph = ps.capture(model, {"x": torch.randn(2, 5, H)})
    for batch, tokens in ((2, 5), (3, 17), (1, 4)):
        x = torch.randn(batch, tokens, H)
        assert torch.equal(graph(x), model(x))
    roles = {s.role: s.module for s in survey(graph.base_capture) if s.kind == "linear"}
    assert roles == {"attn.q": "one", "attn.k": "two", "attn.v": "three", "attn.o": "last"}
    core = next(s for s in survey(graph.base_capture) if s.kind == "attention")
    assert (core.facts["heads"], core.facts["head_dim"]) == (N, D)


LEFT = {
    "a matrix for each head": (
        lambda x, W: torch.einsum("btnd,nde->btne", headed(x), W),
        (N, D, D),
    ),
    "a sum of the weight's own": (lambda x, W: torch.einsum("bth,hn->bt", x, W), (H, N)),
    "a number for each feature": (lambda x, W: torch.einsum("bth,h->bth", x, W), (H,)),
    "a diagonal": (lambda x, W: torch.einsum("bth,hh->bth", x, W), (H, H)),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_product_with_one_matrix_stays_as_it_is(name: str) -> None:
    run, shape = LEFT[name]
    model = One(Layer(run, shape, lambda C: C))
    graph = ps.capture(model, {"x": torch.randn(2, 5, H)})
    x = torch.randn(3, 4, H)
    assert torch.equal(graph(x), model(x))
    assert not [s for s in survey(graph.base_capture) if s.kind == "linear"]
