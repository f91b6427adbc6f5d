"""What waits for calls of parts: hooks of one part, and hooks of all modules there are."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

import peftsurgery as ps
from peftsurgery.capture.waiting import KEPT


class Scale:
    """An object of Python that a part is given."""

    factor = 2.0


class Scaled(nn.Module):
    """A linear whose output an object scales."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Scale) -> Tensor:
        y: Tensor = self.inner(x) * scale.factor
        return y


class Model(nn.Module):
    """A part that is given an object, and a list of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = Scaled()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(20))
        self.made: list[weakref.ref[Scale]] = []

    def forward(self, x: Tensor) -> Tensor:
        scale = Scale()
        self.scale_made(scale)
        y: Tensor = self.scaled(x, scale)
        for layer in self.layers:
            y = layer(y)
        return y

    def scale_made(self, scale: Scale) -> None:
        """What a test looks at."""


def small() -> tuple[Model, Any]:
    torch.manual_seed(0)
    model = Model()
    return model, ps.capture(model, {"x": torch.randn(2, 4)})


def test_what_waits_for_all_modules_leaves_out_those_that_are_given_objects() -> None:
    model, graph = small()
    x, seen = torch.randn(3, 4), list[str]()
    with FlopCounterMode(display=False) as counter:
        actual = graph(x)
    with FlopCounterMode(display=False) as expected:
        assert torch.equal(actual, model(x))
    assert counter.get_total_flops() == expected.get_total_flops()
    handle = register_module_forward_hook(lambda part, *_: seen.append(type(part).__name__))
    assert torch.equal(graph(x), model(x))
    handle.remove()
    assert "Tanh" in seen
    graph.scaled.register_forward_hook(lambda *_: None)
    with pytest.raises(ps.SurgeryError, match=r"PSG220.*given a Scale"):
        graph(x)


def test_what_parts_were_given_in_an_example_does_not_live_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[weakref.ref[Scale]] = []
    monkeypatch.setattr(Model, "scale_made", lambda _, scale: made.append(weakref.ref(scale)))
    graph = small()[1]
    gc.collect()
    assert made
    assert not any(reference() for reference in made)
    assert graph.base_capture.calls["scaled"][0].is_opaque


def test_hooks_that_come_and_go_leave_no_more_than_a_few_programs() -> None:
    model, graph = small()
    x, sizes = torch.randn(3, 4), []
    with torch.no_grad():
        expected = model(x)
        for number in range(20):
            seen: list[Any] = []
            handle = graph.layers[number][1].register_forward_hook(lambda *_, s=seen: s.append(1))
            assert torch.equal(graph(x), expected)
            assert seen
            handle.remove()
            sizes.append(sum(len(layer.programs) for layer in graph.layers))
        assert sizes[-1] == sizes[KEPT - 1] == 20 + KEPT
        graph.layers[0][1].register_forward_hook(lambda _, args, y: y * 2)
        assert not torch.equal(graph(x), expected)  # one of those forgotten is made again
