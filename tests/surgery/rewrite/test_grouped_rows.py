"""Adapters that do alike are computed together: each row's numbers stay its adapter's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.surgery.model.operated import OperatedModel
from tests.parity.models import base, batch, captured
from tests.surgery.reference import randomise

NAMES = ["a", "c", None, "b", "a"]
INPUTS = {"input_ids": batch(5, 6)["input_ids"]}


def several(graph: Any, rules: Any, settings: Sequence[dict[str, Any]] = ({}, {}, {})) -> Any:
    """Adapters a, b, ... of one rule file, each with its settings; none is active."""
    for name, given in zip("abcdef", settings, strict=False):
        graph = ps.apply(graph, rules, name=name, **given)
    randomise(graph, scale=0.2).deactivate()
    return graph.eval()


def alone(
    graph: OperatedModel, names: Sequence[str | None], call: Callable[[int], Tensor]
) -> Tensor:
    """What each row is with its adapter for all."""
    rows = []
    for row, name in enumerate(names):
        with graph.only(*filter(None, [name])), torch.no_grad():
            rows.append(call(row))
    return torch.cat(rows)


def products(graph: OperatedModel, names: Sequence[str | None]) -> int:
    """How many products with a parameter of an adapter a call of these adapters computes."""
    mode = graph._adapters.choice(names).mode
    capture = graph._find(graph.call_of(input_ids=torch.ones(len(names), 6).long()), mode)
    nodes = [n for programs in capture.programs.values() for p in programs for n in p.graph.nodes]
    words = ("linear", "matmul", "bmm")
    return sum("surgery" in n.meta and any(w in n.name for w in words) for n in nodes)


RULES = {
    "llama": ["dora", "houlsby"],
    "gpt2": ["lora_attention", "ia3"],
    "bert": ["pfeiffer", "parallel_adapter"],
}


@pytest.mark.parametrize("name", list(RULES))
def test_each_row_is_what_its_adapter_alone_makes_of_it(name: str) -> None:
    inputs = batch(5, 6)
    for rules in RULES[name]:
        graph = several(captured(name), rules)
        with torch.no_grad():
            got = graph(**inputs, adapters=NAMES).logits
        expected = alone(graph, NAMES, partial(row_of, graph, inputs))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def row_of(graph: OperatedModel, inputs: dict[str, Tensor], row: int) -> Tensor:
    """The logits of one row of a batch."""
    logits: Tensor = graph(**{n: value[row : row + 1] for n, value in inputs.items()}).logits
    return logits


@pytest.mark.parametrize("name", ["llama"])
def test_more_adapters_are_no_more_products(name: str) -> None:
    for rules in ("lora_attention", "houlsby"):
        graph = several(captured(name), rules, [{}] * 6)
        assert products(graph, ["a", "b"]) == products(graph, list("abcdef")) > 0


@pytest.mark.parametrize("name", ["llama"])
def test_adapters_of_other_settings_are_grouped_among_themselves(name: str) -> None:
    ranks = [{"rank": rank} for rank in (2, 3, 2, 3)]
    graph = several(captured(name), "lora_attention", ranks)
    rows = ["d", "a", None, "c", "b"]
    with torch.no_grad():
        got = graph(**INPUTS, adapters=rows).logits
    expected = alone(graph, rows, partial(row_of, graph, INPUTS))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert products(graph, list("abcd")) == 2 * products(graph, list("ac"))


@pytest.mark.parametrize("name", ["llama"])
def test_rows_are_those_of_peft(name: str, tmp_path: Path) -> None:
    graph: Any = several(captured(name), "lora_qv", [{"rank": 4, "alpha": 8}] * 3)
    theirs: Any = None
    for adapter in "abc":
        ps.to_peft(graph, tmp_path / adapter, name=adapter)
        if theirs is None:
            theirs = peft.PeftModel.from_pretrained(base(name), tmp_path / adapter, "a")
        else:
            theirs.load_adapter(tmp_path / adapter, adapter)
    names = ["__base__" if each is None else each for each in NAMES]
    with torch.no_grad():
        expected = theirs.eval()(**INPUTS, adapter_names=names).logits
        got = graph(**INPUTS, adapter_names=names).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama"])
def test_gradients_of_rows_are_those_of_each_adapter_alone(name: str) -> None:
    graph = several(captured(name), "lora_qv")
    graph.activate()
    rows, ids = ["a", "b", "b"], INPUTS["input_ids"][:3]
    graph(input_ids=ids, adapters=rows).logits.square().sum().backward()
    got = {n: p.grad.clone() for n, p in graph.learnt().items() if p.grad is not None}
    graph.zero_grad()
    for adapter in "ab":
        of_mine = torch.tensor([each == adapter for each in rows])
        with graph.only(adapter):
            graph(input_ids=ids[of_mine]).logits.square().sum().backward()
    for n, value in graph.learnt().items():
        expected = torch.zeros_like(value) if value.grad is None else value.grad
        torch.testing.assert_close(
            got.get(n, torch.zeros_like(value)), expected, rtol=1e-4, atol=1e-5
        )


class Laid(nn.Module):
    """A linear that is given its batch first, last, or flattened with the tokens, in one way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner, self.way = nn.Linear(6, 6), way

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        if self.way == "tokens first":
            return self.inner(x.transpose(0, 1)).transpose(0, 1)
        if self.way == "flat":
            return self.inner(x.reshape(-1, width)).view(batch, tokens, width)
        if self.way == "flat, tokens first":
            y = self.inner(x.transpose(0, 1).reshape(-1, width))
            return y.view(tokens, batch, width).transpose(0, 1)
        if self.way == "one for each":
            return self.inner(x.mean(1)).unsqueeze(1)
        return self.inner(x.unsqueeze(2)).squeeze(2)


LOW_RANK = ps.Rule(
    match="linear",
    params={
        "A": {"shape": [3, "in"], "init": "zeros"},
        "B": {"shape": ["out", 3], "init": "zeros"},
        "c": {"shape": ["out"], "init": "zeros"},
    },
    rewrite="y * c + linear(silu(linear(dropout(x, 0.1), A)), B, c)",
)
MIXING = ps.Rule(
    match="linear",
    params={"s": {"shape": ["out"], "init": "ones"}},
    rewrite="layer_norm(y * s, s)",
)
WAYS = ["first", "tokens first", "flat", "flat, tokens first", "one for each"]


@pytest.mark.parametrize("rule", [LOW_RANK, MIXING], ids=["grouped", "not grouped"])
@pytest.mark.parametrize("way", WAYS)
def test_the_batch_may_lie_anywhere(way: str, rule: Any) -> None:
    x = torch.randn(5, 4, 6)
    graph = several(ps.capture(Laid(way).eval(), inputs=(torch.randn(2, 3, 6),)), rule)
    with torch.no_grad():
        got = graph(x, adapters=NAMES)
    torch.testing.assert_close(got, alone(graph, NAMES, lambda row: graph(x[row : row + 1])))
