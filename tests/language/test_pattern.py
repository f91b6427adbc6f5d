"""Patterns against graphs that torch.export makes of hand-written modules."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peftsurgery.errors import SurgeryError
from peftsurgery.language.expression import parse
from peftsurgery.language.pattern_search import find_pattern

GATED = "mul(silu(linear(x, gate)), linear(x, up))"


class Gated(nn.Module):
    def __init__(self, swapped=False, cast=False, other=False):
        super().__init__()
        self.gate, self.up = nn.Linear(8, 16, bias=False), nn.Linear(8, 16)
        self.swapped, self.cast, self.other = swapped, cast, other

    def forward(self, x):
        gate, up = F.silu(self.gate(x)), self.up(x + 1 if self.other else x)
        if self.cast:
            gate = gate.to(torch.float64).to(torch.float32)
        return up * gate if self.swapped else gate * up


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.W, self.b = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8))

    def forward(self, x):
        h = torch.addmm(self.b, x, self.W) * 2.0
        return F.gelu(h, approximate="tanh") + torch.sub(h, x, alpha=2) + F.gelu(h)


def graph_of(module):
    return torch.export.export(module, (torch.randn(4, 8),)).module(check_guards=False).graph


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("cast", [False, True])
def test_a_gated_feed_forward_is_found_in_either_order_and_through_casts(swapped, cast):
    (match,) = find_pattern(parse(GATED), graph_of(Gated(swapped, cast)))
    bound = {name: str(node.target) for name, node in match.bindings.items()}
    assert bound["gate"] == "gate.weight"
    assert bound["up"] == "up.weight"
    assert bound["x"] == "x"
    assert match.bindings["y"] is match.root
    assert "mul" in bound["y"]


def test_a_repeated_name_must_be_the_same_value():
    assert not find_pattern(parse(GATED), graph_of(Gated(other=True)))
    assert not find_pattern(parse("mul(silu(a), silu(a))"), graph_of(Gated()))


def test_an_argument_left_out_may_be_anything_and_one_given_must_be_there():
    graph = graph_of(Gated())
    assert len(find_pattern(parse("linear(x, W)"), graph)) == 2
    (match,) = [
        m for m in find_pattern(parse("linear(x, W, b)"), graph) if m.bindings["b"] is not None
    ]
    assert str(match.bindings["b"].target) == "up.bias"


def test_other_spellings_and_variants():
    graph = graph_of(Other())
    (linear,) = find_pattern(parse("linear(x, W, b)"), graph)
    assert [str(linear.bindings[name].target) for name in "xWb"] == ["x", "W", "b"]
    assert linear.turned == {"W"}
    assert len(find_pattern(parse("linear(x, W) * 2"), graph)) == 1
    assert not find_pattern(parse("linear(x, W) * 3"), graph)
    assert len(find_pattern(parse("gelu(h)"), graph)) == 1  # not the one by tanh
    assert not find_pattern(parse("a - b"), graph)  # alpha=2 is another operation
    assert len(find_pattern(parse("a + b"), graph)) == 2


def test_what_surgery_inserted_is_not_matched():
    graph = graph_of(Gated())
    for node in graph.nodes:
        node.meta["surgery"] = True
    assert not find_pattern(parse(GATED), graph)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x", "PSG144"),
        ("3", "PSG144"),
        ("x[0]", "PSG144"),
        ("mul(x, y)", "PSG144"),
        ("dropout(x, 0.1)", "PSG144"),
        ("nothing(x)", "PSG114"),
        ("linear(x)", "PSG115"),
        ("layer_norm(x, eps=2)", "PSG144"),
        ("x if a else b", "PSG144"),
    ],
)
def test_what_cannot_be_a_pattern_is_refused(text, code):
    with pytest.raises(SurgeryError) as refusal:
        find_pattern(parse(text), graph_of(Gated()))
    assert refusal.value.code == code


def test_a_search_is_bounded():
    class Chain(nn.Module):
        def forward(self, x):
            for _ in range(40):
                x = x + x
            return x

    text = "a0"
    for i in range(1, 24):
        text = f"({text} + a{i})"
    with pytest.raises(SurgeryError) as refusal:
        find_pattern(parse(text + " + 7"), graph_of(Chain()))
    assert refusal.value.code == "PSG144"
