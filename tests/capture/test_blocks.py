"""Blocks are real modules: of few shapes, one code object each, hooked, checkpointed, compiled."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peftsurgery.capture import Block
from tests.capture.pairs import assert_same, assert_same_gradients, pair
from tests.models.zoo import ZOO, ids

# How many blocks a model has, and of how many shapes: two layers of every kind.
COUNTS = {
    "bert": (2, 1),
    "gpt2": (2, 1),
    "llama": (2, 1),
    "gemma3": (2, 2),  # layers of local and of global attention take different masks or tables
    "mixtral": (2, 1),
    "vit": (2, 1),
    "functional": (2, 1),
    "transformer_encoder": (2, 1),
    "bart": (4, 2),
}


@pytest.mark.parametrize("name", COUNTS)
def test_blocks_of_equal_structure_share_one_program(name: str) -> None:
    capture = pair(name).graph.captures[0]
    programs = [p for path, found in capture.programs.items() if path for p in found]
    blocks, shapes = COUNTS[name]
    assert len(programs) == blocks
    labels = {program.label for program in programs}
    assert len(labels) <= shapes
    assert len({id(program.forward.__code__) for program in programs}) == len(labels)


def test_nested_blocks_are_blocks_too() -> None:
    programs = pair("swin").graph.captures[0].programs
    kinds = {path: found[0].kind for path, found in programs.items()}
    assert kinds["swin.encoder.layers.1"] == "SwinStage"
    assert kinds["swin.encoder.layers.1.blocks.0"] == "SwinLayer"
    calls = programs["swin.encoder.layers.1"][0].graph.find_nodes(
        op="call_module", target="blocks.0"
    )
    assert [call.kwargs["program"] for call in calls] == [
        programs["swin.encoder.layers.1.blocks.0"][0].label
    ]


def test_forward_hooks_see_and_change_a_blocks_output() -> None:
    both = pair("llama")
    for model in (both.original, both.graph):
        layer = model.get_submodule("model.layers.0")
        layer.register_forward_hook(lambda part, args, output: output * 2)
    assert_same(*both.run(**ZOO["llama"].inputs(2, 5)))


def test_forward_pre_hooks_see_and_change_a_blocks_inputs() -> None:
    both = pair("gpt2")

    def halve(part: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
        first, *rest = args
        assert isinstance(first, torch.Tensor)
        return (first / 2, *rest)

    for model in (both.original, both.graph):
        model.get_submodule("transformer.h.1").register_forward_pre_hook(halve)
    assert_same(*both.run(**ZOO["gpt2"].inputs(2, 5)))


def test_activation_checkpointing_changes_no_gradient() -> None:
    both = pair("bert")
    both.train()
    both.graph.gradient_checkpointing()
    expected, actual = both.run(**ZOO["bert"].inputs(2, 6), labels=torch.tensor([0, 1]))
    assert_same(expected, actual)
    expected.loss.backward()
    actual.loss.backward()
    assert_same_gradients(both)


def test_checkpointing_keeps_fewer_activations() -> None:
    def saved(enabled: bool) -> int:
        graph = pair("llama").graph.train()
        graph.gradient_checkpointing(enabled)
        kept = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            graph(**ZOO["llama"].inputs(2, 6))
        return kept

    assert saved(True) < 0.7 * saved(False)


def test_torchs_checkpoint_works_on_a_block() -> None:
    both = pair("functional")
    for part in both.graph.modules():
        if isinstance(part, Block):
            part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False)
    expected, actual = both.run(**ZOO["functional"].inputs(2, 5))
    assert_same(expected, actual)
    expected.square().sum().backward()
    actual.square().sum().backward()
    assert_same_gradients(both)


def test_blocks_of_one_shape_compile_once() -> None:
    graph = pair("llama").graph
    inputs = {"input_ids": ids(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    expected = graph(**inputs).logits
    compiled: list[torch.fx.GraphModule] = []

    def backend(module: torch.fx.GraphModule, example: list[torch.Tensor]) -> object:
        compiled.append(module)
        return module.forward

    torch._dynamo.reset()
    for part in graph.modules():
        if isinstance(part, Block):
            part.compile(backend=backend)
    with torch.no_grad():
        assert torch.equal(graph(**inputs).logits, expected)
    assert len(compiled) == 1


def test_a_printed_model_reads_like_the_model() -> None:
    both = pair("llama")
    text = str(both.graph)
    assert text.startswith("GraphModel[LlamaForCausalLM](")
    assert "(layers): ModuleList(" in text
    assert "2 x Block[LlamaDecoderLayer.0](" in text
    assert "(q_proj): Linear(in_features=32, out_features=32, bias=False)" in text
    kept = [line for line in str(both.original).splitlines() if "Linear(" in line]
    assert [line for line in text.splitlines() if "Linear(" in line] == kept


def test_a_deep_copy_is_independent_and_exact() -> None:
    both = pair("gpt2")
    twin = copy.deepcopy(both.graph)
    with torch.no_grad():
        for parameter in both.graph.parameters():
            parameter.zero_()
    inputs = ZOO["gpt2"].inputs(2, 5)
    assert_same(both.original(**inputs), twin(**inputs))
    tied = twin.get_parameter("lm_head.weight")
    assert tied is twin.get_parameter("transformer.wte.weight")


def test_a_part_that_is_no_block_says_so_when_it_is_called() -> None:
    part = pair("bert").graph.get_submodule("bert.embeddings")
    with pytest.raises(Exception, match="PSG204"):
        part(torch.ones(2, 3))
