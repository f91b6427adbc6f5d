"""A further capture of a model is the one that a model makes which was captured in no other way."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.capture.captures import Capture
from peftsurgery.capture.equal_blocks.out_of_sight import Hidden, OutOfSightError
from peftsurgery.capture.module_calls import GIVEN, RETURNED
from peftsurgery.capture.outlines import describe
from tests.models import blocks
from tests.models.traces import cached, deeper
from tests.models.zoo import Inputs, entry


class Penalised(blocks.Stack):
    """Adds how large its last block's weights are, if it is asked to."""

    def forward(self, x: Tensor, penalty: bool = False) -> Tensor:
        y = super().forward(x)
        return y + self.blocks[-1].inner.weight.norm() if penalty else y


class PenalisedAll(blocks.Stack):
    """Adds how large all its weights are, if it is asked to."""

    def forward(self, x: Tensor, penalty: bool = False) -> Tensor:
        y = super().forward(x)
        return y + sum(p.norm() for p in self.parameters()) if penalty else y


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """For each trace, how many blocks' parameters were out of sight, and whether it was made."""
    home = importlib.import_module("peftsurgery.capture.export")
    export, read, traces = home._export, home._read, list[tuple[int, bool]]()

    def exporting(module: Any, call: Any, notes: Any, likely: Any, *args: Any, **named: Any) -> Any:
        traces.append((len(likely or ()), False))
        return export(module, call, notes, likely, *args, **named)

    def reading(*args: Any) -> Any:
        made = read(*args)
        traces[-1] = traces[-1][0], True
        return made

    monkeypatch.setattr(home, "_export", exporting)
    monkeypatch.setattr(home, "_read", reading)
    return traces


def described(capture: Capture) -> list[Any]:
    """Every program of a capture, with what its nodes say of where they come from."""
    labels: dict[str, int] = {}
    return [
        (path, program.kind, program.tensors, capture.conditions, capture.calls, _nodes(p.graph))
        for path, programs in capture.programs.items()
        for program in programs
        for p in [program]
        if labels.setdefault(program.label, len(labels)) >= 0
    ]


def _nodes(graph: torch.fx.Graph) -> list[Any]:
    inner = {n.kwargs["program"] for n in graph.find_nodes(op="call_module")}
    number = {f"'{label}'": f"'program {i}'" for i, label in enumerate(sorted(inner))}
    lines = []
    for node, line in zip(graph.nodes, describe(graph), strict=True):
        text = repr(line)
        for label, name in number.items():
            text = text.replace(label, name)
        stack = repr(node.meta.get("nn_module_stack")) if node.op == "call_function" else ""
        lines.append((text, stack, *(sorted(node.meta.get(key, ())) for key in (GIVEN, RETURNED))))
    return lines


def both(module: nn.Module, first: Inputs, then: Inputs) -> tuple[Capture, Capture]:
    """The capture for inputs made after another one, and made first."""
    graph = ps.capture(module, inputs=first)
    return graph.capture_for(**then), ps.capture(module, inputs=then).captures[0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_labels_after_a_plain_call(name: str, tried: list[tuple[int, bool]]) -> None:
    inputs = entry(name).inputs(2, 6)
    after, alone = both(deeper(name, 5).eval(), inputs, {**inputs, "labels": inputs["input_ids"]})
    assert described(after) == described(alone)
    assert tried == [(0, True), (3, True), (0, True)]


@pytest.mark.parametrize("past", [0, 5], ids=["prefill", "decode"])
def test_a_cache_after_a_plain_call(past: int, tried: list[tuple[int, bool]]) -> None:
    module = deeper("llama", 5).eval()
    inputs = entry("llama").inputs(2, 6)
    graph = ps.capture(module, inputs=inputs)
    after = graph.capture_for(**cached(module, past))
    alone = ps.capture(module, inputs=cached(module, past)).captures[0]
    assert described(after) == described(alone)
    assert tried[1] == (3, True)


@pytest.mark.parametrize("kind", [Penalised, PenalisedAll], ids=lambda kind: kind.__name__)
def test_code_that_looks_at_a_blocks_parameters_has_them_in_sight(
    kind: type[blocks.Stack], tried: list[tuple[int, bool]]
) -> None:
    module = kind(blocks.Block).eval()
    x = torch.randn(2, 3, 8)
    graph = ps.capture(module, inputs={"x": x})
    with torch.no_grad():
        assert torch.equal(graph(x=x, penalty=True), module(x=x, penalty=True))
    assert tried[1][0] > 0
    assert tried[1:] == [(tried[1][0], False), (0, True)]


def test_a_block_that_has_become_another_is_traced(tried: list[tuple[int, bool]]) -> None:
    module: Any = blocks.Stack(blocks.Block).eval()
    x = torch.randn(2, 3, 8)
    graph = ps.capture(module, inputs={"x": x})
    last = graph.source.module.get_submodule(f"blocks.{blocks.COUNT - 1}")
    last.inner.register_forward_hook(lambda part, args, result: result * 2)
    with torch.no_grad():
        assert torch.equal(graph(x=x[0]), module(x=x[0]))
    assert not tried[1][1]
    assert tried[2] == (0, True)


class Numbered(nn.Module):
    """A layer that knows its number; ``asked`` ones do something else from the tenth on."""

    def __init__(self, number: int, asked: bool) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.layer_idx, self.asked = number, asked

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of width 4."""
        y = self.norm(self.inner(x))
        return x - y if self.asked and self.layer_idx > 9 else x + y


class Deep(nn.Module):
    """Seventeen of them."""

    def __init__(self, asked: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Numbered(number, asked) for number in range(17))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of width 4."""
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("asked", [False, True])
def test_a_deep_model_is_guessed_to_be_of_equal_blocks(
    asked: bool, tried: list[tuple[int, bool]]
) -> None:
    module, x = Deep(asked).eval(), torch.randn(2, 3, 4)
    graph = ps.capture(module, inputs={"x": x})
    assert tried == ([(15, False), (0, True)] if asked else [(15, True)])
    with torch.no_grad():
        assert torch.equal(graph(x=x), module(x=x))


def test_a_guess_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = entry("llama").inputs(2, 6)
    module = deeper("llama", 17).eval()
    guessed = ps.capture(module, inputs=inputs).captures[0]
    home = importlib.import_module("peftsurgery.capture.captures")
    monkeypatch.setattr(home, "told_by_number", lambda blocks: ())
    assert described(guessed) == described(ps.capture(module, inputs=inputs).captures[0])


def test_what_is_hidden_is_back_afterwards() -> None:
    module = blocks.Stack(blocks.Block)
    names = [name for name, _ in module.named_parameters()]
    hidden = Hidden(module, ["blocks.1"])
    with hidden.kept():
        assert len(list(module.named_parameters())) < len(names)
        with hidden.guarded(), pytest.raises(OutOfSightError):
            next(module.get_submodule("blocks.1.inner").parameters())
        with hidden.guarded(), pytest.raises(OutOfSightError):
            hasattr(module.get_submodule("blocks.1.inner"), "weight")
        with hidden.guarded():
            assert not hasattr(module.get_submodule("blocks.1.inner"), "other")
    assert [name for name, _ in module.named_parameters()] == names


def test_other_threads_find_a_module_as_it_is() -> None:
    module = blocks.Stack(blocks.Block).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        wanted, names = module(x), list(module.state_dict())
    hidden = Hidden(module, ["blocks.1"])
    with hidden.kept(), hidden.guarded(), ThreadPoolExecutor(1) as another, torch.no_grad():
        assert torch.equal(another.submit(lambda: module(x)).result(), wanted)
        assert another.submit(lambda: list(module.state_dict())).result() == names
        twin = another.submit(deepcopy, module).result()
        assert list(twin.state_dict()) == names
        assert type(twin.get_submodule("blocks.1.inner")._parameters) is dict


def test_a_block_that_shares_a_weight_or_has_a_buffer_is_in_sight() -> None:
    module: Any = blocks.Stack(blocks.Block)
    module.blocks[0].inner.weight = module.blocks[2].inner.weight
    module.blocks[1].register_buffer("table", torch.zeros(3))
    hidden = Hidden(module, [f"blocks.{number}" for number in range(blocks.COUNT)])
    assert len(hidden.parts) == blocks.COUNT - 3
