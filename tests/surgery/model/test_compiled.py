"""Compiled operated models: adapters switched, merged, by row and trained, as uncompiled ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.surgery.model.operated import OperatedModel
from tests.parity.models import base, batch, captured
from tests.surgery.reference import adapted, pairs_of, randomise

INPUTS = batch(3, 6)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def both_adapted(**options: Any) -> tuple[OperatedModel, nn.Module]:
    """A compiled model with LoRA, and the original, to be given hooks that add the same."""
    operated = randomise(ps.apply(captured("llama"), "lora_qv", rank=3, alpha=6), scale=0.3).eval()
    operated.compile(**options)
    return operated, base("llama")


def test_adapters_are_there_and_not_there() -> None:
    operated, original = both_adapted(backend="eager", fullgraph=True)
    with torch.no_grad():
        plain = original(**INPUTS)
        with adapted(original, pairs_of(operated, 2.0)):
            expected = original(**INPUTS)
        torch.testing.assert_close(operated(**INPUTS).logits, expected.logits)
        torch.testing.assert_close(operated(**INPUTS).loss, expected.loss)
        with operated.only():
            torch.testing.assert_close(operated(**INPUTS).logits, plain.logits)
        with operated.merged():
            torch.testing.assert_close(operated(**INPUTS).logits, expected.logits)


@pytest.mark.slow
def test_every_way_to_choose_gives_what_it_gives_uncompiled() -> None:
    model = ps.apply(captured("llama"), "lora_all_linear", name="a", rank=2)
    model = ps.apply(ps.apply(model, "dora", name="b", rank=3), "prefix_tuning", name="p")
    randomise(model, scale=0.3).eval().deactivate("p")
    compiled = copy.deepcopy(model)
    compiled.compile(backend="eager")

    def only(graph: OperatedModel, *names: str) -> Tensor:
        with graph.only(*names):
            return graph(**INPUTS).logits

    def hooked(graph: OperatedModel) -> Tensor:
        part = graph.get_submodule("model.layers.0.self_attn.q_proj")
        handle = part.register_forward_hook(lambda part, args, output: output / 2)
        result: Tensor = graph(**INPUTS).logits
        handle.remove()
        return result

    written = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ways: list[Callable[[OperatedModel], Tensor]] = [
        lambda graph: graph(**INPUTS).logits,
        lambda graph: only(graph, "b"),
        lambda graph: only(graph, "p"),
        lambda graph: graph(**INPUTS, adapters=["a", None, "b"]).logits,
        lambda graph: graph(**batch(2, 9)).loss,
        lambda graph: graph.generate(INPUTS["input_ids"], num_beams=2, **written),
        hooked,
    ]
    for way in ways:
        with torch.no_grad():
            torch.testing.assert_close(way(compiled), way(model), rtol=1e-5, atol=1e-5)


def trained(graph: OperatedModel) -> dict[str, Tensor]:
    """What is learnt after some steps, each with another size of batch, one of them recomputed."""
    graph.train()
    optimizer = torch.optim.SGD(graph.learnt().values(), lr=0.1)
    for number, size in enumerate((2, 3, 3)):
        graph.gradient_checkpointing(number == 2)
        graph(**batch(size, 5 + size)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in graph.learnt().items()}


@pytest.mark.slow
def test_steps_learn_the_same() -> None:
    model = randomise(ps.apply(captured("llama"), "lora_attention", rank=3))
    compiled = copy.deepcopy(model)
    compiled.compile(backend="aot_eager")
    expected = trained(model)
    for path, value in trained(compiled).items():
        torch.testing.assert_close(value, expected[path], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_inductor_computes_the_same_or_says_what_is_missing() -> None:
    operated, original = both_adapted()
    with adapted(original, pairs_of(operated, 2.0)):
        expected = original(**INPUTS)
    expected.loss.backward()
    loss = operated(**INPUTS).loss
    torch.testing.assert_close(loss, expected.loss)
    loss.backward()
    assert all(value.grad is not None for value in operated.learnt().values())
    torch._dynamo.reset()
    with torch._inductor.config.patch(
        {"cpp.cxx": (None, "no-such-compiler"), "fx_graph_cache": False}
    ):
        broken, _ = both_adapted()
        with pytest.raises(ps.SurgeryError, match="no-such-compiler") as raised:
            broken(**INPUTS)
    assert raised.value.code == "PSG224"
