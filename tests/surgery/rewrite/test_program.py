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
from peftsurgery.surgery.rewrite.program import ProxyDomain, Walk


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
        (("{x: 2 * x}", "{x: x + 1}"), lambda x, W, b: 2 * (x + 1) @ W.T + b),  # as folds have it
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


class Sum(nn.Module):
    """Two linears of one value, added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(x)
        return self.first(x) + self.second(x)


@pytest.mark.parametrize("is_inner_first", [True, False])
def test_an_input_of_a_site_within_another_is_changed_after_that_ones(is_inner_first: bool) -> None:
    module, x = Sum(), torch.randn(3, 4)
    pattern = {"pattern": "add(linear(x, G), linear(x, U))"}
    outer = ps.Rule(match=pattern, rewrite={"x": "x + 1"})
    inner = ps.Rule(match="linear", where={"path": "first"}, rewrite={"x": "2 * x"})
    operated: ps.GraphModel = ps.capture(module, {"x": x})
    for name, rule in zip("ab", (inner, outer) if is_inner_first else (outer, inner), strict=True):
        operated = ps.apply(operated, rule, name=name)
    more = torch.sin(x) + 1
    torch.testing.assert_close(operated(x), module.first(2 * more) + module.second(more))


def test_a_value_that_is_computed_later_is_computed_ahead_and_again() -> None:
    program, (cut,) = planned("2 * y")
    walk, y = Walk(program), cut.site.nodes["y"]
    walk.begin()
    ahead = ProxyDomain(walk, cut, {}, y).proxy(y).node
    assert y not in walk.values.everywhere
    walk.graph.output(ahead)
    module, x = graph().source.module, torch.randn(3, 4)
    found = fx.Interpreter(module, graph=walk.graph).run(x)
    torch.testing.assert_close(found, module.first(torch.sin(x)))


def test_a_weight_rewritten_with_its_bias_is_changed_once_for_cuts_that_follow() -> None:
    twice = '{W: "2 * W", b: "2 * b"}'
    first = f"{{match: linear, where: {{path: first}}, rewrite: {twice}, fold: {twice}}}"
    second = "{match: linear, where: {path: first}, rewrite: 'y + linear(x, W)'}"
    operated = ps.apply(graph(), ps.parse_rules(f"name: t\nrules: [{first}, {second}]"))
    x, plain = torch.randn(3, 4), graph().source.module
    assert isinstance(plain, Two)
    seen = torch.sin(x)
    y = 2 * plain.first(seen) + torch.nn.functional.linear(seen, 2 * plain.first.weight)
    wanted = seen + plain.second(torch.tanh(y))
    with torch.no_grad():
        assert torch.allclose(operated(x), wanted, atol=1e-6)


class Counting(nn.Module):
    """What has an effect: a buffer that is written to, and two draws of chance."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        first = nn.functional.dropout(torch.sin(x), 0.5, self.training)
        self.calls.add_(1)
        second = nn.functional.dropout(torch.cos(x), 0.2, self.training)
        result: Tensor = self.linear(first + self.calls * second)
        return result


def test_what_was_there_keeps_its_order_and_its_names() -> None:
    counting = ps.capture(Counting(), {"x": torch.randn(2, 4)})
    rule = ps.Rule(match="linear", rewrite={"x": "dropout(x, 0.1)", "W": "2 * W", "y": "y + x"})
    made = ps.apply(counting, rule).captures[0].top.graph
    there = [node for node in made.nodes if "surgery" not in node.meta and node.op != "get_attr"]
    before = [node for node in counting.base_capture.top.graph.nodes if node.op != "get_attr"]
    assert [node.name for node in there] == [node.name for node in before]
    assert len(there) < len(made.nodes)
