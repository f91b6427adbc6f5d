"""Compiled: each distinct stretch of code once, at any depth, with the original's numbers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from peftsurgery.capture import GraphModel
from peftsurgery.errors import SurgeryError
from tests.capture.pairs import Pair, assert_same, assert_same_gradients, pair, pair_of
from tests.models.zoo import ZOO, hf, ids


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    """What other tests compiled is forgotten, and what this one did."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counted:
    """A backend that runs graphs as they are, and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(module)
        return module.forward


def compiled(both: Pair, **options: Any) -> Counted:
    backend = Counted()
    both.graph.compile(backend=backend, **options)
    return backend


def deep(layers: int) -> Pair:
    make = hf(
        "LlamaForCausalLM",
        "LlamaConfig",
        vocab_size=99,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        use_cache=False,
    )
    return pair_of(make(), {"input_ids": ids(2, 6)})


SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in ("bert", "gpt2", "mixtral", "t5")]


@pytest.mark.parametrize("name", ["functional", "resnet", *SLOW])
def test_outputs_and_gradients_are_the_originals(name: str) -> None:
    both = pair(name)
    both.train()
    backend = compiled(both, fullgraph=True)
    inputs = ZOO[name].inputs(2, 6)
    assert_same(*both.run(**inputs))
    # Code that is traced may take other kernels (transformers' experts do, depending on where their
    # tensors lie in memory): gradients are compared with those of the original traced likewise.
    traced: Any = torch.compile(both.original, backend=Counted())
    for outputs in dataclasses.replace(both, original=traced).run(**inputs):
        first = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        first.square().sum().backward()
    assert_same_gradients(both)
    assert backend.graphs


@pytest.mark.slow
def test_what_is_compiled_does_not_grow_with_depth() -> None:
    counts = []
    for layers in (3, 9):
        both = deep(layers)
        backend = compiled(both)
        for _ in range(2):
            outputs = both.run(input_ids=ids(2, 6), labels=ids(2, 6))
            assert_same(*outputs)
            for each in outputs:
                each.loss.backward()
        assert_same_gradients(both)
        counts.append([len(module.graph.nodes) for module in backend.graphs])
    assert counts[0] == counts[1]
    assert len(counts[0]) == 2  # a block, and what is behind them


@pytest.mark.slow
def test_stages_call_their_own_blocks_compiled() -> None:
    both = pair("swin")
    backend = compiled(both)
    with torch.no_grad():
        assert_same(*both.run(**ZOO["swin"].inputs(2, 6)))
    attending = [sum("dot_product" in str(n.target) for n in m.graph.nodes) for m in backend.graphs]
    assert max(attending) == 1  # no stage is compiled with the layers in it


@pytest.mark.slow
def test_other_sizes_and_signatures_share_what_they_can() -> None:
    both = pair("llama")
    backend = compiled(both)
    with torch.no_grad():
        for batch, tokens in ((2, 6), (3, 9), (4, 5)):
            assert_same(*both.run(**ZOO["llama"].inputs(batch, tokens)))
        count = len(backend.graphs)
        labels = ids(4, 5)
        assert_same(*both.run(**ZOO["llama"].inputs(4, 5), labels=labels))
    assert len(backend.graphs) == count + 1  # the loss; blocks and what is before them were there


def test_generation_is_the_originals() -> None:
    both = pair("llama")
    compiled(both)
    wanted = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    expected = both.original.generate(ids(2, 4), **wanted)
    assert torch.equal(both.graph.generate(ids(2, 4), **wanted), expected)


@pytest.mark.slow
def test_hooks_of_blocks_and_of_what_is_in_them_see_and_change_what_they_did() -> None:
    both = pair("bert")
    compiled(both)
    inputs = ZOO["bert"].inputs(2, 5)
    assert_same(*both.run(**inputs))
    for path in ("bert.encoder.layer.1", "bert.encoder.layer.0.attention.self.query"):
        for model in (both.original, both.graph):
            model.get_submodule(path).register_forward_hook(lambda part, args, out: out * 1.5)
        assert_same(*both.run(**inputs))


def test_blocks_that_are_recomputed_are_compiled() -> None:
    both = pair("bert")
    both.train()
    backend = compiled(both)
    both.graph.gradient_checkpointing()
    expected, actual = both.run(**ZOO["bert"].inputs(2, 6), labels=torch.tensor([0, 1]))
    assert_same(expected, actual)
    expected.loss.backward()
    actual.loss.backward()
    assert_same_gradients(both)
    assert backend.graphs


def test_a_copy_runs_compiled_and_neither_undoes_the_other() -> None:
    both = pair("functional")
    backend = compiled(both)
    inputs = ZOO["functional"].inputs(2, 5)
    twin = copy.deepcopy(both.graph)
    both.graph.compile(disable=True)
    with torch.no_grad():
        expected, actual = both.run(**inputs)
        assert_same(expected, actual)
        assert not backend.graphs
        assert torch.equal(twin(**inputs), expected)
    assert backend.graphs


@pytest.mark.parametrize("within", ["compile", "export", "transform", "mode"])
def test_a_compiled_model_can_be_part_of_another_trace(within: str) -> None:
    both = pair("functional")
    compiled(both)
    graph, inputs = both.graph, ZOO["functional"].inputs(2, 5)
    expected = both.original(**inputs)
    if within == "compile":
        actual = torch.compile(graph, backend="eager")(**inputs)
    elif within == "export":
        actual = torch.export.export(graph, (), inputs).module()(**inputs)
    elif within == "transform":
        own = dict(graph.named_parameters())
        sums = torch.func.grad(lambda p: torch.func.functional_call(graph, p, (), inputs).sum())
        assert sums(own).keys() == own.keys()
        actual = graph(**inputs)
    else:
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            actual = graph(**inputs)
        assert counter.get_total_flops() > 0
    torch.testing.assert_close(actual, expected)


def refusal(graph: GraphModel, **options: Any) -> SurgeryError:
    with pytest.raises(SurgeryError) as raised:
        graph.compile(**options)
    assert raised.value.code == "PSG223"
    return raised.value


def test_options_that_torch_does_not_take_are_refused_at_once() -> None:
    both = pair("functional")
    assert "backend" in str(refusal(both.graph, backnd="eager"))
    refusal(both.graph, backend="no_such_backend")
    refusal(both.graph, mode="fastest")
    refusal(both.graph, options={"no_such_option": True})
    refusal(both.graph, mode="default", options={"max_autotune": True})
    refusal(both.graph, dynamic="sometimes")
    assert_same(*both.run(**ZOO["functional"].inputs(2, 5)))  # as it was


def test_a_backend_that_fails_is_said_by_code() -> None:
    def broken(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        raise RuntimeError("no device")

    both = pair("functional")
    both.graph.compile(backend=broken)
    with pytest.raises(SurgeryError, match="no device") as raised:
        both.graph(**ZOO["functional"].inputs(2, 5))
    assert raised.value.code == "PSG224"
    both.graph.compile(disable=True)
    assert_same(*both.run(**ZOO["functional"].inputs(2, 5)))


def test_an_error_of_the_models_own_stays_its_own() -> None:
    both = pair("llama")
    compiled(both)
    with pytest.raises(IndexError), torch.no_grad():
        both.graph(input_ids=torch.full((2, 3), 10_000))
