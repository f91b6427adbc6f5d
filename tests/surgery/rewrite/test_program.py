"""One program rewritten: a copy with the cuts in, each seeing what those before it made."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn

import peftsurgery as ps
from peftsurgery.capture import Program
from peftsurgery.language.rule_file import RuleFile
from peftsurgery.language.settings import resolve_settings
from peftsurgery.surgery.plan.cut import Cut, Operation
from peftsurgery.surgery.plan.select import select_cuts
from peftsurgery.surgery.rewrite.capture import rewritten_graph


class Two(nn.Module):
    """Two linears with an activation and a sum between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(x)
        return x + self.second(torch.tanh(self.first(x)))


@cache
def graph() -> ps.GraphModel:
    torch.manual_seed(0)
    return ps.capture(Two(), {"x": torch.randn(2, 4)})


def rules(*rewrites: str, path: str = "first") -> RuleFile:
    each = [
        f"{{match: linear, where: {{path: {path}}}, rewrite: {rewrite}}}" for rewrite in rewrites
    ]
    return ps.parse_rules(f"name: t\nrules: [{', '.join(each)}]")


def planned(*rewrites: str) -> tuple[Program, list[Cut]]:
    file = rules(*rewrites)
    cuts, _ = select_cuts(graph().base_capture, Operation(file, resolve_settings(file), "one"))
    return graph().base_capture.top, cuts


def operations(made: fx.Graph) -> list[str]:
    return [str(node.target) for node in made.nodes if node.op == "call_function"]


def test_the_program_itself_stays_as_it_was() -> None:
    program, cuts = planned("2 * y", "{x: x + 1}")
    before = str(program.graph)
    assert str(rewritten_graph(program, cuts)) != before
    assert str(program.graph) == before
    assert str(rewritten_graph(program, [])) == before


def test_what_is_inserted_is_the_expression_and_knows_whose_it_is() -> None:
    program, cuts = planned("tanh(y) * 3")
    made = rewritten_graph(program, cuts)
    inserted = [node for node in made.nodes if "surgery" in node.meta]
    assert [node.meta["surgery"] for node in inserted] == ["one"] * len(inserted)
    names = [getattr(node.target, "__name__", "") for node in inserted]
    assert names == ["tanh", "mul"]
    (old,) = (n for n in made.nodes if n.args and n.name == cuts[0].site.nodes["y"].name)
    stack = old.meta["nn_module_stack"]
    assert all(node.meta["nn_module_stack"] == stack for node in inserted)


def test_what_is_not_read_is_not_there() -> None:
    program, cuts = planned("'y * 0 + sum(W, [0, 1])'", "2 * y")
    made = rewritten_graph(program, cuts)
    assert all(node.users for node in made.nodes if node.op != "output" and "surgery" in node.meta)
    more = [*operations(made)]
    for target in operations(program.graph):
        more.remove(target)
    assert len(more) == 4  # times 0, the sum, the addition, times 2


@pytest.mark.parametrize(
    ("rewrites", "by_hand"),
    [
        (("2 * y", "y + 1"), lambda x, W, b: 2 * (x @ W.T + b) + 1),
        (("y + 1", "2 * y"), lambda x, W, b: 2 * (x @ W.T + b + 1)),
        (("2 * y", "{x: x + 1}"), lambda x, W, b: 2 * ((x + 1) @ W.T + b)),
        (("{W: 2 * W}", "{W: W + 1}"), lambda x, W, b: x @ (2 * W + 1).T + b),
        (("{W: 2 * W, b: 0 * b}", "y + b"), lambda x, W, b: x @ (2 * W).T),
        (("{x: 2 * x, y: y + x}",), lambda x, W, b: 2 * x @ W.T + b + x),
        (("'linear(x, W @ W, b) + y'",), lambda x, W, b: x @ (W @ W).T + b + x @ W.T + b),
    ],
    ids=lambda value: "; ".join(value) if isinstance(value, tuple) else "by_hand",
)
def test_a_cut_sees_what_those_before_it_made(
    rewrites: tuple[str, ...], by_hand: Callable[..., Tensor]
) -> None:
    module, x = graph().source.module, torch.randn(3, 4)
    W, b = module.first.weight, module.first.bias
    entering = torch.sin(x)
    expected = entering + module.second(torch.tanh(by_hand(entering, W, b)))
    operated = ps.apply(graph(), rules(*rewrites))
    torch.testing.assert_close(operated(x), expected, rtol=0, atol=1e-5)


def test_an_input_that_others_read_too_is_changed_for_its_reader_alone() -> None:
    module, x = graph().source.module, torch.randn(3, 4)
    operated = ps.apply(graph(), rules("{x: 0 * x}"))
    expected = torch.sin(x) + module.second(torch.tanh(module.first.bias)).expand(3, 4)
    torch.testing.assert_close(operated(x), expected, rtol=0, atol=1e-6)
