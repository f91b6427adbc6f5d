"""A weight that activations are multiplied with is a linear site however the product is spelled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftsurgery as ps
from peftsurgery.anatomy import survey

Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]

SPELLINGS: dict[str, Spelling] = {
    "weight first": lambda x, W, b: (W @ x.transpose(1, 2)).transpose(1, 2),
    "weight first, a column of biases": lambda x, W, b: (W @ x.mT + b[:, None]).mT,
    "weight first, of vectors": lambda x, W, b: torch.stack([torch.mv(W, t) for t in x[0]]),
    "einsum": lambda x, W, b: torch.einsum("btd,od->bto", x, W),
    "einsum, weight first": lambda x, W, b: torch.einsum("od,btd->bto", W, x),
    "einsum, turned result": lambda x, W, b: torch.einsum("btd,od->bot", x, W).mT + b,
    "einsum, dots": lambda x, W, b: torch.einsum("...d,od->...o", x, W) + b,
    "tensordot": lambda x, W, b: torch.tensordot(x, W, ([-1], [1])),
    "inner": lambda x, W, b: torch.inner(x, W) + b,
    "one matrix for a batch": lambda x, W, b: torch.bmm(x, W.T[None].expand(len(x), -1, -1)),
    "baddbmm": lambda x, W, b: torch.baddbmm(b, x, W.T.expand(len(x), -1, -1)),
    "broadcast": lambda x, W, b: x @ W.T[None],
    "linear": F.linear,
}
HELD_TURNED: dict[str, Spelling] = {
    "weight first": lambda x, V, b: (V.T @ x.mT).mT + b,
    "einsum": lambda x, V, b: torch.einsum("btd,do->bto", x, V),
    "tensordot": lambda x, V, b: torch.tensordot(x, V, 1),
}


class Spelled(nn.Module):
    """One product."""

    def __init__(self, product: Spelling, turned: bool) -> None:
        super().__init__()
        self.product = product
        self.W = nn.Parameter(torch.randn(4, 6) if turned else torch.randn(6, 4))
        self.b = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.product(torch.sin(x), self.W, self.b))


CASES = [(p, False) for p in SPELLINGS.values()] + [(p, True) for p in HELD_TURNED.values()]
NAMES = [*SPELLINGS, *(f"{name}, (in, out)" for name in HELD_TURNED)]


@pytest.mark.parametrize(("product", "turned"), CASES, ids=NAMES)
def test_every_spelling_of_a_product_with_a_weight_is_a_linear(
    product: Spelling, turned: bool
) -> None:
    model, x = Spelled(product, turned), torch.randn(2, 5, 4)
    graph = ps.capture(model, {"x": x})
    linears = [site for site in survey(graph.base_capture) if site.kind == "linear"]
    assert {site.parameter for site in linears} == {"W"}
    assert {(site.facts["in"], site.facts["out"]) for site in linears} == {(4, 6)}
    operated = ps.apply(graph, "lora_all_linear", rank=2, alpha=2)
    for parameter in operated.learnt().values():
        nn.init.normal_(parameter)
    (A,) = (p for n, p in operated.learnt().items() if n.endswith("A"))
    (B,) = (p for n, p in operated.learnt().items() if n.endswith("B"))
    folded = ps.fold(operated)
    with torch.no_grad():
        found = operated(x)
        model.W += (B @ A).T if turned else B @ A
        torch.testing.assert_close(found, model(x), rtol=0, atol=1e-5)
        torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-5)


class Unreachable(nn.Module):
    """Products of activations with parameters that no site expresses, and with a constant.

    One of them is a stack that is seen as a matrix, which is a linear.
    """

    def __init__(self) -> None:
        super().__init__()
        self.summed, self.viewed = (
            nn.Parameter(torch.randn(6, 4)),
            nn.Parameter(torch.randn(2, 3, 6)),
        )
        self.heads, self.scale = nn.Parameter(torch.randn(2, 3, 3)), nn.Parameter(torch.randn(6))
        self.register_buffer("fixed", torch.randn(6, 6))
        self.last = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = (x[..., None, :] * self.summed).sum(-1) * self.scale
        y = F.linear(y, self.viewed.view(6, 6)) @ self.get_buffer("fixed")
        y = torch.einsum("bthd,hde->bthe", y.unflatten(-1, (2, 3)), self.heads).flatten(2)
        last: Tensor = self.last(y)
        return last


def test_parameters_that_no_site_expresses_are_named() -> None:
    operated = ps.apply(ps.capture(Unreachable(), {"x": torch.randn(2, 5, 4)}), "lora_all_linear")
    assert [match["parameter"] for match in operated.report.matches] == ["viewed", "last.weight"]
    uncovered = operated.report.to_dict()["uncovered"]
    assert sorted(uncovered) == ["heads", "scale", "summed"]
    assert "heads (read by einsum)" in str(operated.report)
    assert "summed (read by mul)" in str(operated.report)
