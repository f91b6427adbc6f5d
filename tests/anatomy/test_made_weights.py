"""Weights that are computed of parameters are adapted, and folded where that can be undone.

The oracle is torch's own: the same module with the low-rank product added to what it computes, the
gradients of that, and the modules' own functions on the folded parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import peftsurgery as ps
from peftsurgery.errors import SurgeryError

OUT, IN = 6, 4


@dataclass(frozen=True)
class Made:
    """A weight (OUT, IN) made of parameters of these shapes, and whether it can be any matrix."""

    weight: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    refusal: str | None = None


MASK = torch.arange(24).reshape(OUT, IN) % 3 != 0

MADE = {
    "scaled rows": Made(lambda W, g: W * g, ((OUT, IN), (OUT, 1))),
    "scaled columns": Made(lambda W, g: g * W, ((OUT, IN), (IN,))),
    "divided": Made(lambda W, g: W / g.exp(), ((OUT, IN), (OUT, 1))),
    "a number": Made(lambda W, g: g * W, ((OUT, IN), ())),
    "shifted": Made(lambda W, d: W - 2 * d, ((OUT, IN), (OUT, 1))),
    "turned": Made(lambda V, g: (V * g).T, ((IN, OUT), (OUT,))),
    "a stack of heads": Made(lambda H: H.reshape(OUT, IN), ((2, 3, IN),)),
    "heads in another order": Made(lambda H: H.permute(1, 0, 2).reshape(OUT, IN), ((3, 2, IN),)),
    "joined": Made(lambda P, Q: torch.cat([P, Q]), ((2, IN), (OUT - 2, IN))),
    "weight norm": Made(
        lambda V, g: g * V / torch.linalg.vector_norm(V, dim=1, keepdim=True),
        ((OUT, IN), (OUT, 1)),
    ),
    "normalised": Made(lambda V, g: g * F.normalize(V, dim=1), ((OUT, IN), (OUT, 1))),
    "two factors": Made(lambda U, V: U @ V, ((OUT, 2), (2, IN)), "PSG424"),
    "rows of length one": Made(lambda V: F.normalize(V, dim=1), ((OUT, IN),), "PSG424"),
    "standardised": Made(
        lambda W: (W - W.mean(1, keepdim=True)) / W.std(1, keepdim=True), ((OUT, IN),), "PSG424"
    ),
    "masked": Made(lambda W: W * MASK, ((OUT, IN),), "PSG424"),
    "activated": Made(torch.tanh, ((OUT, IN),), "PSG424"),
}


class Computing(nn.Module):
    """One linear with a computed weight, to which a change may be added."""

    def __init__(self, made: Made) -> None:
        super().__init__()
        self.made = made
        self.parts = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in made.shapes)
        self.b = nn.Parameter(torch.randn(OUT))

    def forward(self, x: Tensor, change: Tensor | None = None) -> Tensor:
        weight = self.made.weight(*self.parts)
        weight = weight if change is None else weight + change
        return torch.tanh(F.linear(torch.sin(x), weight, self.b))


def drawn(model: ps.OperatedModel) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of the only adapter, with random values."""
    A, B = (model.get_parameter(name) for name in sorted(model.report.added))
    nn.init.normal_(A)
    nn.init.normal_(B)
    return A, B


@pytest.mark.parametrize("name", MADE)
def test_a_computed_weight_is_trained_and_folded_or_refused(name: str) -> None:
    torch.manual_seed(0)
    made, x = MADE[name], torch.randn(2, 5, IN)
    model = Computing(made)
    graph = ps.capture(model, {"x": x})
    operated = ps.apply(graph, "lora_all_linear", rank=2, alpha=2)
    A, B = drawn(operated)
    found = operated(x)
    expected = model(x, B @ A)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    grads = torch.autograd.grad(found.square().sum(), (A, B))
    wanted = torch.autograd.grad(expected.square().sum(), (A, B))
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-4)
    assert operated.report.to_dict()["uncovered"] == []
    if made.refusal is not None:
        with pytest.raises(SurgeryError) as caught:
            ps.fold(operated)
        assert caught.value.code == made.refusal
        assert "parts.0" in caught.value.message
        return
    folded = ps.fold(operated)
    assert isinstance(folded, Computing)
    torch.testing.assert_close(folded(x), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(folded.b, model.b, rtol=0, atol=0)


TORCHS: dict[str, tuple[Callable[[nn.Linear], nn.Module], bool]] = {
    "weight_norm": (parametrizations.weight_norm, True),
    "weight_norm of columns": (lambda linear: parametrizations.weight_norm(linear, dim=1), True),
    "weight_norm with hooks": (nn.utils.weight_norm, True),
    "spectral_norm": (parametrizations.spectral_norm, False),
    "orthogonal": (parametrizations.orthogonal, False),
}


@pytest.mark.parametrize("name", TORCHS)
def test_parametrised_linears_of_torch_are_adapted_where_they_are_called(name: str) -> None:
    torch.manual_seed(0)
    around, is_foldable = TORCHS[name]
    model = nn.Sequential(around(nn.Linear(IN, OUT)), nn.Tanh(), nn.Linear(OUT, 3)).eval()
    x = torch.randn(2, 5, IN)
    operated = ps.apply(ps.capture(model, {"input": x}), "lora_all_linear", rank=2, alpha=2)
    assert [match["module"] for match in operated.report.matches] == ["0", "2"]
    learnt = operated.learnt()
    for parameter in learnt.values():
        nn.init.normal_(parameter)
    A, B = (learnt[n] for n in sorted(learnt) if n.startswith("0."))
    C, D = (learnt[n] for n in sorted(learnt) if n.startswith("2."))
    with torch.no_grad():
        inner = torch.tanh(model[0](x) + x @ A.T @ B.T)
        expected = model[2](inner) + inner @ C.T @ D.T
        torch.testing.assert_close(operated(x), expected, rtol=0, atol=1e-5)
        if is_foldable:
            folded = ps.fold(operated)
            torch.testing.assert_close(folded(x), expected, rtol=0, atol=1e-5)
        else:
            with pytest.raises(SurgeryError, match="PSG424"):
                ps.fold(operated)


def test_rules_read_a_computed_weight_as_the_model_computes_it() -> None:
    torch.manual_seed(0)
    made, x = MADE["scaled rows"], torch.randn(2, 5, IN)
    model = Computing(made)
    rule = ps.parse_rules(
        """
name: magnitudes
about: A magnitude for each row, which starts as the row's own length.
rules:
  - match: linear
    params: {m: {shape: [out], init: "norm(W, 1)"}}
    rewrite: {W: "W * (m / norm(W, 1))[:, None]"}
    fold: "W * (m / norm(W, 1))[:, None]"
"""
    )
    operated = ps.apply(ps.capture(model, {"x": x}), rule)
    (m,) = operated.learnt().values()
    with torch.no_grad():
        weight = made.weight(*model.parts)
        torch.testing.assert_close(m, weight.norm(dim=1))
        torch.testing.assert_close(operated(x), model(x), rtol=0, atol=1e-6)
        m += 1
        expected = model(x, weight / weight.norm(dim=1, keepdim=True))
        torch.testing.assert_close(operated(x), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(ps.fold(operated)(x), expected, rtol=0, atol=1e-5)


class Twice(nn.Module):
    """One matrix of which two weights are made, by a scale each."""

    def __init__(self, alike: bool) -> None:
        super().__init__()
        self.W, self.alike = nn.Parameter(torch.randn(IN, IN)), alike
        self.g = nn.Parameter(torch.rand(2, IN, 1) + 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(x, self.W * self.g[0]))
        return torch.sin(F.linear(x, self.W * self.g[0 if self.alike else 1]))


def test_a_matrix_of_which_other_weights_are_made_too_is_not_folded() -> None:
    x = torch.randn(2, 5, IN)
    operated = ps.apply(ps.capture(Twice(False), {"x": x}), "lora_all_linear", rank=2)
    drawn(operated)
    with pytest.raises(SurgeryError, match="PSG408"):
        ps.fold(operated)
    operated = ps.apply(ps.capture(Twice(True), {"x": x}), "lora_all_linear", rank=2)
    drawn(operated)
    with torch.no_grad():
        torch.testing.assert_close(ps.fold(operated)(x), operated(x), rtol=0, atol=1e-5)


class Biased(nn.Module):
    """A linear of a table that the model holds, whose result biases what comes after."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(5, IN))
        self.into, self.out = nn.Linear(IN, OUT), nn.Linear(OUT, OUT)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.relu(self.into(self.get_buffer("table"))))
        return torch.tanh(x + y)


def test_a_linear_that_reads_a_buffer_is_a_linear() -> None:
    model, x = Biased(), torch.randn(2, 5, OUT)
    operated = ps.apply(ps.capture(model, {"x": x}), "lora_all_linear", rank=2, alpha=2)
    assert [match["module"] for match in operated.report.matches] == ["into", "out"]
    learnt = operated.learnt()
    for parameter in learnt.values():
        nn.init.normal_(parameter)
    A, B, C, D = (learnt[name] for name in sorted(learnt))
    with torch.no_grad():
        inner = torch.relu(
            F.linear(model.get_buffer("table"), model.into.weight + B @ A, model.into.bias)
        )
        expected = torch.tanh(x + F.linear(inner, model.out.weight + D @ C, model.out.bias))
        torch.testing.assert_close(operated(x), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(ps.fold(operated)(x), expected, rtol=0, atol=1e-5)


def test_what_needs_the_weight_itself_refuses_a_computed_one() -> None:
    x = torch.randn(2, 5, IN)
    graph = ps.capture(Computing(MADE["scaled rows"]), {"x": x})
    stored = ps.parse_rules(
        """
name: stored
about: Weights in four bits.
rules:
  - {match: linear, store: {W: "nf4(64)"}}
"""
    )
    with pytest.raises(SurgeryError, match="PSG325"):
        ps.apply(graph, stored)
    operated = ps.apply(graph, "lora_all_linear", rank=2)
    drawn(operated)
    with pytest.raises(SurgeryError, match="PSG419"):
        ps.as_lora(operated)
