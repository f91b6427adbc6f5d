"""The running form of rewritten programs: what it takes, what it leaves, that it is the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.surgery.rewrite.joined_call import JoinedCall
from tests.models.zoo import entry

SCALED = """
name: scaled
with: {{rank: 2}}
rules:
  - match: linear
    where: {{path: {path}}}
    params:
      A: {{shape: [rank, in], init: normal(1)}}
      B: {{shape: [out, rank], init: normal(1)}}
      s: {{shape: [1], init: ones}}
    let: {{branch: "linear(linear(x, A), B)"}}
    rewrite: {rewrite}
"""


class Small(nn.Module):
    """Two linears of one input, and one of their product."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(6, 8, bias=False)
        self.three = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.three(torch.relu(self.one(x)) * self.two(x))


def small(dtype: torch.dtype = torch.float32) -> ps.GraphModel:
    torch.manual_seed(0)
    return ps.capture(Small().to(dtype), inputs={"x": torch.randn(3, 5, 6, dtype=dtype)})


def scaled(rewrite: str, path: str = ".*") -> Any:
    return ps.parse_rules(SCALED.format(rewrite=rewrite, path=path))


def both(graph: ps.GraphModel, rules: Any, **settings: Any) -> tuple[Any, Any]:
    """The same adapter in its running form and as the rules say, with noise in what it adds."""
    made = []
    for exact in (False, True):
        torch.manual_seed(1)
        operated = ps.apply(graph, rules, exact=exact, **settings)
        generator = torch.Generator().manual_seed(2)
        for value in operated.learnt().values():
            value.data += 0.1 * torch.randn(value.shape, generator=generator).to(value.dtype)
        made.append(operated)
    return made[0], made[1]


def joins(model: Any) -> list[JoinedCall]:
    """The joined operations of all programs of the first capture."""
    programs = {p for each in model.captures[0].programs.values() for p in each}
    graphs = [p.graph if p.running is None else p.running for p in programs]
    targets = (node.target for graph in graphs for node in graph.nodes)
    return [target for target in targets if isinstance(target, JoinedCall)]


def tensors(value: Any) -> Iterator[Tensor]:
    yield from (each for each in torch.utils._pytree.tree_leaves(value) if isinstance(each, Tensor))


def assert_same(ours: Any, exact: Any, bound: float, *args: Any, **inputs: Any) -> None:
    """Outputs and gradients differ by at most ``bound`` of their largest value."""
    found = []
    for model in (ours, exact):
        torch.manual_seed(3)
        outputs = [y for y in tensors(model(*args, **inputs)) if y.is_floating_point()]
        wanted = [p for p in model.parameters() if p.requires_grad]
        total = sum(y.float().square().mean() for y in outputs)
        assert isinstance(total, Tensor)
        gradients = torch.autograd.grad(total, wanted, allow_unused=True)
        found.append([*outputs, *gradients])
    for mine, theirs in zip(*found, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs.numel():
            assert mine.dtype == theirs.dtype
            assert (mine - theirs).abs().max() <= bound * theirs.abs().max() + 1e-12


@pytest.mark.parametrize(
    "rewrite",
    [
        "y + 2 * branch",
        "y - branch / 4",
        "2 * (branch + 3 * linear(linear(x, A), B)) + y",
        "y + 0.5 * (linear(tanh(linear(x, A)), B) + branch)",
    ],
)
def test_sums_are_joined_with_the_linears_that_they_are_added_to(rewrite: str) -> None:
    ours, exact = both(small(), scaled(rewrite))
    assert joins(ours)
    assert not joins(exact)
    assert_same(ours, exact, 1e-5, x=torch.randn(3, 5, 6))


@pytest.mark.parametrize(
    "rewrite",
    [
        "y + s * branch",  # a scale that is a parameter
        "y * (1 + branch)",
        "2 * y + branch",  # the base has a number of its own
        "y + branch * branch",  # a value that is read twice
        "(y + branch) + branch",
        "branch + 1",
        "y + 2 * (branch - linear(linear(x, A), B))",  # a difference that is nothing, exactly
    ],
)
def test_what_is_no_such_sum_is_left_as_it_is(rewrite: str) -> None:
    ours, exact = both(small(), scaled(rewrite))
    assert not joins(ours)
    x = torch.randn(3, 5, 6)
    assert torch.equal(ours(x=x), exact(x=x))


@pytest.mark.parametrize(
    "rewrite",
    [
        "tanh(y) * (y + branch)",  # the base is read beside the sum
        "y + branch + y * (y + branch)",
        "(y + 3 * branch) * s + sum(branch, -1, True)",
        "y + linear(detach(linear(x, A)), B)",
    ],
)
def test_values_that_something_else_reads_keep_their_values(rewrite: str) -> None:
    ours, exact = both(small(), scaled(rewrite))
    assert_same(ours, exact, 1e-5, x=torch.randn(3, 5, 6))


def test_sites_of_one_input_are_one_operation() -> None:
    ours, exact = both(small(), scaled("y + branch"))
    first, second = joins(ours)
    assert (len(first.places.weights), len(second.places.weights)) == (2, 1)
    x = torch.randn(3, 5, 6, requires_grad=True)
    mine, theirs = (torch.autograd.grad(model(x=x).sum(), x)[0] for model in (ours, exact))
    torch.testing.assert_close(mine, theirs)


def test_a_site_whose_weight_is_trained_is_joined_too() -> None:
    graph = small()
    ours, exact = (
        ps.apply(graph, scaled("y + branch"), train=["one"], exact=e) for e in (False, True)
    )
    for model in (ours, exact):
        torch.manual_seed(4)
        for value in model.learnt().values():
            value.data.normal_()
    assert_same(ours, exact, 1e-5, x=torch.randn(3, 5, 6))


def test_several_adapters_are_one_sum() -> None:
    graph = small()
    made = []
    for exact in (False, True):
        torch.manual_seed(5)
        model = ps.apply(graph, scaled("y + branch"), name="a", exact=exact)
        made.append(ps.apply(model, scaled("y + 3 * branch"), name="b"))
    ours, exact = made
    assert [len(each.terms) for each in joins(ours)] == [4, 2]
    assert not joins(exact)  # as the model that it was applied to
    assert_same(ours, exact, 1e-5, x=torch.randn(3, 5, 6))
    assert_same(ours, exact, 1e-5, torch.randn(4, 5, 6))
    rows = {"adapters": ["a", None, "b"]}
    assert_same(ours, exact, 1e-5, x=torch.randn(3, 5, 6), **rows)
    assert [ps.eject(ours, "a")._rewriting.exact, ps.eject(exact, "a")._rewriting.exact] == [
        False,
        True,
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casts_are_made_once(dtype: torch.dtype) -> None:
    ours, exact = both(small(dtype), scaled("y + 2 * branch"))
    assert joins(ours)
    bound = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-12}[dtype]
    assert_same(ours, exact, bound, x=torch.randn(3, 5, 6, dtype=dtype))


SHIPPED = (
    *("lora_all_linear", "rslora", "adalora", "dora", "pissa", "olora", "qlora", "unipelt"),
    *("houlsby", "pfeiffer", "parallel_adapter", "mam_adapter", "ia3", "prefix_tuning"),
)
OTHERS = [(name, rule) for name in ("gpt2", "bert") for rule in ("lora_all_linear", "unipelt")]


@pytest.mark.parametrize(("name", "rule"), [*(("llama", rule) for rule in SHIPPED), *OTHERS])
def test_shipped_rules_agree_with_their_text(name: str, rule: str) -> None:
    inputs = entry(name).inputs(2, 6)
    ours, exact = both(graph_of(name), rule)
    assert_same(ours, exact, 2e-5, **inputs)
    assert_same(ours.train(), exact.train(), 2e-5, **inputs)


_GRAPHS: dict[str, ps.GraphModel] = {}


def graph_of(name: str) -> ps.GraphModel:
    if name not in _GRAPHS:
        torch.manual_seed(0)
        _GRAPHS[name] = ps.capture(entry(name).build(), inputs=entry(name).inputs(2, 6))
    return _GRAPHS[name]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dropout_draws_what_it_draws_in_the_rules_order(name: str) -> None:
    ours, exact = both(graph_of(name), "lora_all_linear", settings={"dropout": 0.3})
    assert_same(ours.train(), exact.train(), 2e-5, **entry(name).inputs(2, 6))
    assert joins(ours)


def test_hooks_checkpoints_autocast_and_copies() -> None:
    inputs = entry("llama").inputs(2, 6)
    ours, exact = both(graph_of("llama"), "lora_all_linear")
    seen: list[Tensor] = []
    path = next(m["module"] for m in ours.report.matches)
    hook = ours.get_submodule(path).register_forward_hook(lambda m, a, y: seen.append(y))
    assert_same(ours, exact, 2e-5, **inputs)
    assert len(seen) == 1
    hook.remove()
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = ours(**inputs).logits, exact(**inputs).logits
    assert torch.equal(mine, theirs)
    for model in (ours, exact):
        model.gradient_checkpointing_enable()
    assert_same(ours.train(), exact.train(), 2e-5, **inputs)
    assert_same(copy.deepcopy(ours), exact, 2e-5, **inputs)


def test_graphs_and_diffs_are_those_of_the_text() -> None:
    ours, exact = both(graph_of("llama"), "lora_qv")
    assert not ps.diff(ours, exact)
    for one, other in zip(ours.captures, exact.captures, strict=True):
        for path, programs in one.programs.items():
            assert [p.code for p in programs] == [p.code for p in other.programs[path]]
    folded = [ps.fold(model).state_dict() for model in (ours, exact)]
    assert all(torch.equal(value, folded[1][name]) for name, value in folded[0].items())


def test_second_derivatives_of_an_operated_model() -> None:
    ours, exact = both(small(torch.float64), scaled("y + branch"))
    found = []
    for model in (ours, exact):
        x = torch.linspace(-1, 1, 90, dtype=torch.float64).view(3, 5, 6).requires_grad_()
        (first,) = torch.autograd.grad(model(x=x).square().sum(), x, create_graph=True)
        wanted = [p for p in model.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(first.square().sum(), wanted, allow_unused=True))
    for mine, theirs in zip(*found, strict=True):
        if theirs is not None:
            torch.testing.assert_close(mine, theirs)


def test_exact_is_true_or_false() -> None:
    with pytest.raises(ps.SurgeryError) as caught:
        ps.apply(small(), "lora_all_linear", exact="yes")
    assert caught.value.code == "PSG904"
