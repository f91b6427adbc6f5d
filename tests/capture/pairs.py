"""An original model beside its capture, and how the two are compared: exactly."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftsurgery.capture import GraphModel, capture
from tests.models.captured import captured
from tests.models.zoo import ZOO, hf


@dataclass
class Pair:
    """The same weights twice: in the original and in the captured model."""

    original: nn.Module
    graph: GraphModel

    def train(self, mode: bool = True) -> None:
        self.original.train(mode)
        self.graph.train(mode)

    def run(self, *args: Any, seed: int = 0, **kwargs: Any) -> tuple[Any, Any]:
        """The outputs of both for the same arguments and the same random numbers."""
        torch.manual_seed(seed)
        expected = self.original(*args, **kwargs)
        torch.manual_seed(seed)
        return expected, self.graph(*args, **kwargs)


def pair(name: str) -> Pair:
    """A model of the zoo, in eval mode; captures are shared by all pairs of that name."""
    return Pair(ZOO[name].build(), copy.deepcopy(captured(name)))


def pair_of(module: nn.Module, inputs: Any) -> Pair:
    """A module of one's own; the original is a copy, so that neither can see the other."""
    return Pair(copy.deepcopy(module), capture(module, inputs))


@cache
def _dropping_llama() -> tuple[nn.Module, GraphModel]:
    make = hf(
        "LlamaForCausalLM",
        "LlamaConfig",
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.3,
        use_cache=False,
    )
    torch.manual_seed(0)
    module = make()
    return module, capture(module)


def dropping_llama() -> Pair:
    """A Llama whose only dropout is inside its attention cores."""
    module, graph = _dropping_llama()
    return Pair(copy.deepcopy(module), copy.deepcopy(graph))


def assert_same(expected: Any, actual: Any) -> None:
    """Assert that two outputs have one structure and type, and equal tensors (NaN equals NaN)."""
    leaves, spec = pytree.tree_flatten(expected)
    others, other_spec = pytree.tree_flatten(actual)
    assert type(actual) is type(expected)
    assert other_spec == spec
    for leaf, other in zip(leaves, others, strict=True):
        if not isinstance(leaf, Tensor):
            assert other == leaf
            continue
        assert other.dtype == leaf.dtype
        assert other.shape == leaf.shape
        assert torch.equal(other.nan_to_num(), leaf.nan_to_num()), (other - leaf).abs().max()


def assert_same_gradients(pair: Pair) -> None:
    """Assert that every parameter of the original has the same gradient in the captured model."""
    mine = dict(pair.graph.named_parameters())
    for name, parameter in pair.original.named_parameters():
        if parameter.grad is None:
            assert mine[name].grad is None, name
            continue
        found = mine[name].grad
        assert found is not None, name
        assert torch.equal(found, parameter.grad), name
