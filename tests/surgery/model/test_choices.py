"""What a call chooses is the call's own: of threads, of tasks, of open blocks, of rows."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.surgery.model.operated import OperatedModel
from tests.capture.test_threads import together
from tests.parity.models import base, batch, captured
from tests.surgery.reference import randomise

BIASES = ps.Rule(match="parameter", where={"kind": "bias"}, train=True)
INPUTS = batch(3, 4)["input_ids"]


@pytest.fixture(autouse=True, params=["gpt2"])
def name(request: pytest.FixtureRequest) -> str:
    """The model most tests here are of: they run where it is captured already."""
    return str(request.param)


def applied(graph: Any) -> OperatedModel:
    """Two adapters beside the base, and two that train one and the same of its parameters."""
    for name, rules in (("a", "lora_qv"), ("b", "lora_qv"), ("c", BIASES), ("d", BIASES)):
        graph = ps.apply(graph, rules, name=name)
        graph.deactivate()
    graph.activate("a")
    return randomise(graph, scale=0.3).eval()


@cache
def model() -> OperatedModel:
    """A model of four adapters, of which `a` is active; not to be left otherwise."""
    return applied(captured("gpt2"))


def logits(graph: nn.Module, *names: str, **more: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = graph(input_ids=INPUTS, **more).logits
    return result


def within(graph: OperatedModel, *names: str) -> Tensor:
    with graph.only(*names):
        return logits(graph)


CALLS: list[Callable[[OperatedModel], Tensor]] = [
    logits,
    lambda graph: within(graph),
    lambda graph: within(graph, "b"),
    lambda graph: within(graph, "c"),
    lambda graph: within(graph, "a", "d"),
    lambda graph: logits(graph, adapters=["a", None, "b"]),
    lambda graph: logits(graph, adapters=["c", "d", "a"]),
    lambda graph: logits(graph, adapter_names=["__base__", "d", "b"]),
]


@pytest.mark.slow
def test_eight_threads_of_different_choices_get_what_each_gets_alone() -> None:
    graph = model()
    alone = [call(graph) for call in CALLS]
    assert all(not torch.equal(one, other) for one in alone for other in alone if one is not other)

    def run(call: Callable[[OperatedModel], Tensor], expected: Tensor) -> int:
        return sum(not torch.equal(call(graph), expected) for _ in range(200))

    wrong = together(*(partial(run, *pair) for pair in zip(CALLS, alone, strict=True)))
    assert wrong == [0] * 8
    assert graph.active == ("a",)


@pytest.mark.slow
def test_threads_that_make_a_choice_first_get_what_each_gets_alone() -> None:
    """Nothing is ready: neither the signature nor the programs of any choice."""
    original = base("gpt2")
    graph = applied(ps.capture(original, inputs={"inputs_embeds": torch.randn(2, 3, 32)}))
    results = together(*(partial(call, graph) for call in CALLS))
    assert all(torch.equal(call(graph), got) for call, got in zip(CALLS, results, strict=True))
    torch.testing.assert_close(results[1], original(INPUTS).logits.detach())
    twin = model()
    with torch.no_grad():  # the same parameters in a model that was made by one thread
        for name, value in graph.learnt().items():
            value.copy_(twin.learnt()[name])
    for call in CALLS:
        torch.testing.assert_close(call(graph), call(twin), rtol=0, atol=1e-6)


def test_activating_in_one_thread_leaves_calls_that_choose_for_themselves_alone() -> None:
    graph = model()
    calls = CALLS[1:]
    alone = [call(graph) for call in calls]

    def toggle() -> int:
        for name in ("c", "b") * 30:
            graph.activate(name)
            graph.deactivate(name)
        return 0

    def run(call: Callable[[OperatedModel], Tensor], expected: Tensor) -> int:
        return sum(not torch.equal(call(graph), expected) for _ in range(20))

    runs = [partial(run, *pair) for pair in zip(calls, alone, strict=True)]
    assert together(toggle, *runs) == [0] * 8
    assert graph.active == ("a",)


def test_tasks_choose_for_themselves_and_for_the_tasks_they_start() -> None:
    graph = model()
    alone = {names: within(graph, *names) for names in ((), ("b",), ("c",))}

    async def one(*names: str) -> None:
        with graph.only(*names):
            for _ in range(5):
                await asyncio.sleep(0)
                assert torch.equal(logits(graph), alone[names])
            inner = asyncio.create_task(child())
        assert torch.equal(await inner, alone[names])  # it was started within

    async def child() -> Tensor:
        await asyncio.sleep(0)
        return logits(graph)

    async def several() -> None:
        await asyncio.gather(*(one(*names) for names in alone for _ in range(3)))

    asyncio.run(several())
    assert graph.active == ("a",)


def test_blocks_end_in_any_order_and_errors_leave_nothing_behind() -> None:
    graph = model()
    default = logits(graph)

    def choosing(name: str) -> Iterator[Tensor]:
        with graph.only(name):
            yield logits(graph)
            yield logits(graph)

    first, second = choosing("b"), choosing("c")
    assert torch.equal(next(first), within(graph, "b"))
    assert torch.equal(next(second), within(graph, "c"))
    first.close()
    assert graph.active == ("c",)
    second.close()
    assert graph.active == ("a",)
    with graph.only("b"), graph.rows(["c", None, None]):
        assert graph._adapters.mode.by_row
        with pytest.raises(ZeroDivisionError), graph.only("d"):
            raise ZeroDivisionError(graph.active)
        assert graph._adapters.mode.by_row
    handle = graph.register_forward_hook(lambda *_: 1 / 0)
    for given in ({}, {"adapters": ["b", None, "c"]}):
        with pytest.raises(ZeroDivisionError):
            logits(graph, **given)
    handle.remove()
    for wrong in (["b"] * 2, "abc", ["b", ("a", "c"), None], ["b", "c", "x"], [1, 2, 3]):
        with pytest.raises(ps.SurgeryError, match=r"PSG31[04]"):
            logits(graph, adapters=wrong)
    assert torch.equal(logits(graph), default)
    assert graph.active == ("a",)


def test_a_choice_changes_no_name_and_no_tensor() -> None:
    graph = model()
    before = {name: id(value) for name, value in graph.named_parameters()}
    names = list(graph.state_dict())
    with graph.only("c"):
        assert {name: id(value) for name, value in graph.named_parameters()} == before
        twin = copy.deepcopy(graph)
        assert list(graph.state_dict()) == names
    assert list(twin.state_dict()) == names
    assert torch.equal(logits(twin), logits(graph))  # the choice was the block's, not the model's
    for call in CALLS:
        assert torch.equal(call(twin), call(graph))
    plain = captured("gpt2").source.module
    for names_of in ((), ("c",), ("d",)):
        with graph.only(*names_of):
            folded = ps.fold(graph)
        with torch.no_grad():
            found = folded(INPUTS).logits
        torch.testing.assert_close(found, within(graph, *names_of), rtol=0, atol=1e-5)
        if not names_of:
            same = zip(folded.parameters(), plain.parameters(), strict=True)
            assert all(torch.equal(one, other) for one, other in same)


def test_what_a_block_names_is_trained_in_it_whatever_others_choose() -> None:
    graph = model()

    def trained(name: str) -> set[str]:
        for _ in range(3):
            with graph.only(name):
                graph(input_ids=INPUTS).logits.square().mean().backward()
        return set()

    together(partial(trained, "b"), partial(trained, "c"), partial(trained, "c"))
    reached = {name for name, value in graph.learnt().items() if value.grad is not None}
    assert reached == set(graph.learnt("b", "c"))
    graph.zero_grad()
    kept = {name for name, value in graph.learnt().items() if value.requires_grad}
    assert kept == set(graph.learnt("a"))


@pytest.mark.parametrize(
    "more", [{}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_generated_rows_are_their_adapters_own(more: dict[str, Any]) -> None:
    graph, rows = model(), ["c", None, "b"]
    given: dict[str, Any] = {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": False, **more}
    count = given.get("num_return_sequences", 1)
    mixed = graph.generate(INPUTS, adapters=rows, **given)
    in_pefts_words = ["c", "__base__", "b"]
    assert torch.equal(graph.generate(INPUTS, adapter_names=in_pefts_words, **given), mixed)
    for row, name in enumerate(rows):
        with graph.only(*([name] if name else [])):
            alone = graph.generate(INPUTS[row : row + 1], **given)
        assert torch.equal(mixed[row * count : (row + 1) * count], alone)
    with pytest.raises(ps.SurgeryError, match=r"PSG314: .* named for 1 rows, and the batch has 3"):
        graph.generate(INPUTS, adapters=["c"], **given)
    assert graph.active == ("a",)


class Chooses(nn.Module):
    """A model of its own words: both names are arguments of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, adapter_names: Tensor, adapters: float = 1.0) -> Tensor:
        return self.inner(x) + adapters * adapter_names


def test_an_argument_of_the_original_is_the_originals() -> None:
    rule = ps.Rule(match="linear", params={"s": {"shape": ["out"]}}, rewrite="y + s")
    x, original = torch.randn(3, 4), Chooses()
    graph = ps.apply(ps.capture(original, inputs=(x, x)), rule)
    result = graph(x, adapter_names=2 * x, adapters=3.0)
    assert torch.equal(result, original(x, 2 * x, 3.0))
