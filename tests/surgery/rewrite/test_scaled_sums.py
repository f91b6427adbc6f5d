"""Scaled sums in one operation: which are made, that they round once, that casts are left out."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import peftsurgery as ps
from peftsurgery.surgery.rewrite.scaled_sums import ScaledSum, drop_round_trips, join_scaled_sums
from tests.models.zoo import entry

ATEN, WIDE = torch.ops.aten, torch.float32


def graph_of(function: Any) -> fx.Graph:
    """The traced graph of a function, all of it as surgery inserts it."""
    graph = fx.symbolic_trace(function).graph
    for node in graph.nodes:
        if node.op not in ("placeholder", "output"):
            node.meta["surgery"] = "a"
    return graph


def joined(function: Any) -> tuple[list[fx.Node], Any]:
    """The scaled sums that are made of a function, and the function with them."""
    graph = graph_of(function)
    join_scaled_sums(graph)
    graph.eliminate_dead_code()
    nodes = [node for node in graph.nodes if isinstance(node.target, ScaledSum)]
    return nodes, fx.GraphModule({}, graph)


def rounded_sum(y: Tensor, p: Tensor) -> Tensor:
    return (y.to(torch.float32) + 0.75 * p.to(torch.float32)).to(torch.bfloat16)


SUMS = [
    lambda y, p: y + 0.3 * p,
    lambda y, p: p * 0.3 + y,
    lambda y, p: y - p / 3,
    lambda y, p: y + -(2 * p),
    lambda y, p: 3 * y + p,
    lambda y, p: torch.tanh(y) + 2 * torch.tanh(p),
]
OTHERS = [
    lambda y, p: y + p,  # nothing to save
    lambda y, p: 2 * y + 3 * p,
    lambda y, p: y * p,
    lambda y, p: (y + p).to(torch.bfloat16),
    lambda y, p: y.to(torch.float64) + p.to(torch.float32),
]


@pytest.mark.parametrize("number", range(len(SUMS)))
def test_a_value_and_a_scaled_one_are_one_operation(number: int) -> None:
    nodes, made = joined(SUMS[number])
    assert len(nodes) == 1
    y, p = torch.randn(4, 5), torch.randn(4, 5)
    exact = SUMS[number](y.double(), p.double())
    torch.testing.assert_close(made(y, p).double(), exact, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_other_sums_stay(number: int) -> None:
    nodes, made = joined(OTHERS[number])
    y, p = torch.randn(4, 5), torch.randn(4, 5)
    assert not nodes
    assert torch.equal(made(y, p), OTHERS[number](y, p))


def test_a_sum_of_halves_is_made_and_rounded_as_the_casts_say() -> None:
    nodes, made = joined(rounded_sum)
    (node,) = nodes
    assert [each.name for each in node.args] == ["y", "p"]
    y, p = (torch.randn(64, 64).bfloat16() for _ in range(2))
    found = made(y, p)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, rounded_sum(y, p))


def test_a_scale_that_has_no_half_precision_is_not_rounded() -> None:
    nodes, _ = joined(lambda y, p: (y.to(WIDE) + 0.3 * p.to(WIDE)).to(torch.bfloat16))
    assert [(node.target.rounded, node.target.scale) for node in nodes] == [(None, 0.3)]
    _, plain = joined(SUMS[0])
    y, p = (torch.randn(64, 64).bfloat16() for _ in range(2))
    assert torch.equal(plain(y, p), y + 0.3 * p)


def test_a_sum_within_a_sum_is_one_operation_too() -> None:
    nodes, made = joined(lambda y, p: y + 2 * p + 3 * torch.tanh(p))
    assert [node.target.scale for node in nodes] == [2, 3]
    y, p = torch.randn(4, 5), torch.randn(4, 5)
    torch.testing.assert_close(made(y, p), y + 2 * p + 3 * torch.tanh(p))


def test_values_of_other_dtypes_than_expected_are_cast_as_written() -> None:
    _, made = joined(rounded_sum)
    y, p = torch.randn(4, 4).bfloat16(), torch.randn(4, 4)
    assert torch.equal(made(y, p), rounded_sum(y, p))
    _, plain = joined(SUMS[0])
    whole = torch.arange(4)
    assert torch.equal(plain(y[0], p[0]), y[0] + 0.3 * p[0])
    assert torch.equal(plain(whole, p[0]), whole + 0.3 * p[0])


def test_numbers_are_left_to_python() -> None:
    def sizes(x: Tensor) -> Any:
        n, m = ATEN.sym_size.int(x, 0), ATEN.sym_size.int(x, 1)
        return x.new_ones(n - m, m + 2 * n)

    nodes, made = joined(sizes)
    assert not nodes
    assert made(torch.ones(5, 3)).shape == (2, 13)


def test_a_value_that_is_written_over_meanwhile_is_read_before() -> None:
    def write(y: Tensor, p: Tensor) -> Tensor:
        scaled = 2 * p
        ATEN.mul_.Tensor(p, 0.0)
        return y + scaled

    nodes, made = joined(write)
    assert not nodes
    assert torch.equal(made(torch.ones(3), torch.ones(3)), torch.full((3,), 3.0))


def test_gradients_are_those_of_the_text() -> None:
    _, made = joined(rounded_sum)
    given = [torch.randn(8, 8).bfloat16().requires_grad_() for _ in range(2)]
    ours, theirs = (
        torch.autograd.grad(function(*given).float().square().sum(), given)
        for function in (made, rounded_sum)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("wide", "narrow", "is_dropped"),
    [
        (torch.float32, torch.bfloat16, True),
        (torch.float64, torch.float32, True),
        (torch.bfloat16, torch.float32, False),  # the first cast rounds
        (torch.bfloat16, torch.float16, False),
    ],
)
def test_only_a_wider_dtype_is_a_detour(
    wide: torch.dtype, narrow: torch.dtype, is_dropped: bool
) -> None:
    graph = graph_of(lambda x: x.to(wide).to(narrow))
    drop_round_trips(graph)
    graph.eliminate_dead_code()
    assert len(graph.find_nodes(op="call_method", target="to")) == (1 if is_dropped else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_have_no_wide_copies(dtype: torch.dtype) -> None:
    """A Mixtral's experts: one sum for each site, and none of its values as float32."""
    torch.manual_seed(0)
    inputs = entry("mixtral").inputs(2, 6)
    graph = ps.capture(entry("mixtral").build().to(dtype), inputs=inputs)
    ours, exact = (ps.apply(graph, "lora_experts", exact=each) for each in (False, True))
    for model in (ours, exact):
        torch.manual_seed(1)
        for value in model.learnt().values():
            value.data.normal_(std=0.1)
    runs = {p.runs for each in ours.captures[0].programs.values() for p in each}
    sums = [n for run in runs for n in run.nodes if isinstance(n.target, ScaledSum)]
    assert sums
    assert not [n for run in runs for n in run.nodes if n.target is operator.mul and _inserted(n)]
    with torch.no_grad():
        one, other = (model(**inputs)[0].float() for model in (ours, exact))
    bound = 1e-6 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(one, other, rtol=bound, atol=bound * other.abs().max().item())


def _inserted(node: fx.Node) -> bool:
    return "surgery" in node.meta
