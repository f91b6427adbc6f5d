"""Loops over steps are kept as loops: one capture for every number of steps, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftsurgery.capture.loops.traced import LoopError, Loops
from tests.capture.pairs import Pair, pair_of
from tests.models.stepping import KEPT, STEP_BY_STEP, Layers, Stacked, Stepping

LENGTHS = (2, 1, 7, 13)


def check(both: Pair, x: Tensor) -> None:
    """Outputs and gradients of both are the same to the last bit."""
    found: list[list[Any]] = []
    for module in (both.original, both.graph):
        torch.manual_seed(0)
        given = x.clone().requires_grad_()
        out = module(given)
        out.square().sum().backward()
        named = sorted((n, p.grad) for n, p in module.named_parameters() if p.grad is not None)
        found.append([out, given.grad, *(grad for _, grad in named)])
        module.zero_grad()
    expected, made = found
    assert len(expected) == len(made)
    for one, other in zip(expected, made, strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        torch.manual_seed(1)
        out = both.original(x)
        torch.manual_seed(1)
        assert torch.equal(both.graph(x), out)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", KEPT, ids=lambda kind: kind.__name__)
def test_one_capture_serves_every_number_of_steps(kind: type[Stepping], train: bool) -> None:
    both = pair_of(kind().train(train), {"x": torch.randn(2, 5, 4)})
    both.train(train)
    for length in LENGTHS:
        check(both, torch.randn(3, length, 4))
    assert len(both.graph.captures) <= 2  # a single step may be another graph


@pytest.mark.parametrize("part", ["before", "behind"])
def test_parts_beside_a_loop_may_have_hooks(part: str) -> None:
    both = pair_of(Stacked().eval(), {"x": torch.randn(2, 5, 4)})
    for module in (both.original, both.graph):
        module.get_submodule(part).register_forward_hook(lambda module, args, out: out * 2)
    for length in LENGTHS:
        check(both, torch.randn(3, length, 4))


@pytest.mark.parametrize("kind", STEP_BY_STEP, ids=lambda kind: kind.__name__)
def test_steps_that_are_no_repetition_stay_steps(kind: type[Stepping]) -> None:
    both = pair_of(kind().eval(), {"x": torch.randn(2, 5, 4)})
    for length in LENGTHS:
        check(both, torch.randn(3, length, 4))
    assert len(both.graph.captures) > 2


@pytest.mark.slow
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_take_any_number_of_steps(
    kind: type[nn.RNNBase], batch_first: bool
) -> None:
    layers = Layers(kind, batch_first=batch_first, bidirectional=batch_first).eval()
    x = torch.randn(5, 5, 4)
    both = pair_of(layers, {"x": x})
    for train in (False, True):
        both.train(train)
        for length in LENGTHS:
            check(both, torch.randn((3, length, 4) if batch_first else (length, 3, 4)))
    assert len(both.graph.captures) <= 4  # one for each mode, and for a single step


def unjoined(self: Loops, function: Any, args: Any, kwargs: Any) -> None:
    if getattr(function, "__name__", "") == "stack" and self.begun:
        raise LoopError("it is not to be")


def test_a_loop_that_fails_unplaced_is_traced_step_by_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Loops, "_blamed", lambda self, number: frozenset())
    monkeypatch.setattr(Loops, "kept_call", unjoined)
    both = pair_of(Stacked().eval(), {"x": torch.randn(2, 5, 4)})
    check(both, torch.randn(2, 5, 4))
    assert "loop" not in both.graph.base_capture.top.code
