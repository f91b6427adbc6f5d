"""Casting, copying and sharing: captures follow the model, and the original is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from peftsurgery.capture import capture
from tests.capture.pairs import Pair, assert_same, pair, pair_of
from tests.models.zoo import ZOO, text


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_cast_model_is_the_cast_original(name: str) -> None:
    both = pair(name)
    inputs = ZOO[name].inputs(3, 6)
    exact = both.graph(**inputs).logits
    both.graph.to(torch.bfloat16)
    both.original.to(torch.bfloat16)
    assert_same(*both.run(**inputs))
    assert both.graph(**inputs).logits.dtype == torch.bfloat16
    both.graph.float()
    assert both.graph(**inputs).logits.dtype == exact.dtype


class Half(nn.Module):
    """Decides by the dtype of its weight, holds a constant, and casts by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.to(self.first.weight.dtype))
        if self.first.weight.dtype == torch.float32:
            y = y + 1
        y = y.float() * torch.tensor(1.0009765625)  # not a bf16 number
        return self.second(y.to(self.second.weight.dtype))


def half() -> Pair:
    torch.manual_seed(0)
    return pair_of(Half(), {"x": torch.randn(2, 4)})


def test_code_that_asks_for_a_dtype_is_captured_again() -> None:
    both = half()
    x = torch.randn(3, 4)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        both.graph.to(dtype)
        both.original.to(dtype)
        assert_same(*both.run(x))
    assert len(both.graph.captures) == 3


def test_a_part_may_be_cast_alone() -> None:
    both = half()
    for model in (both.graph, both.original):
        model.get_submodule("first").to(torch.bfloat16)
    assert_same(*both.run(torch.randn(3, 4)))


def test_a_capture_made_after_casting_knows_the_constants_values() -> None:
    both = half()
    both.graph.to(torch.float64)
    both.original.to(torch.float64)
    assert_same(*both.run(torch.randn(3, 4)))


def test_casting_the_captured_model_leaves_the_original_alone() -> None:
    module = Half()
    graph = capture(module, {"x": torch.randn(2, 4)})
    graph.to(torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert {p.dtype for p in graph.parameters()} == {torch.bfloat16}


def test_casting_the_original_leaves_the_captured_model_alone() -> None:
    module = Half()
    twin = copy.deepcopy(module)
    graph = capture(module, {"x": torch.randn(2, 4)})
    module.to(torch.float64)
    x = torch.randn(5, 3, 4)
    assert_same(twin(x), graph(x))  # a new signature, captured only now


def test_weights_are_shared_with_the_original_and_buffers_are_not() -> None:
    module = ZOO["resnet"].build()
    graph = capture(module)
    mine = dict(graph.named_parameters())
    assert all(mine[n].data_ptr() == p.data_ptr() for n, p in module.named_parameters())
    buffers = dict(graph.named_buffers())
    assert all(buffers[n].data_ptr() != b.data_ptr() for n, b in module.named_buffers())


def test_the_original_is_as_it_was_after_a_capture() -> None:
    module = ZOO["llama"].build()
    module.get_submodule("model.norm").train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    known = set(vars(module))
    capture(module)
    assert [part.training for part in module.modules()] == modes
    assert set(vars(module)) == known
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module(**text(2, 3)).logits.shape == (2, 3, 99)


@pytest.mark.parametrize("name", ["llama", "bert_mlm"])
def test_a_tensor_that_is_given_twice_may_be_two_in_the_next_call(name: str) -> None:
    both = pair(name)
    ids = ZOO[name].inputs(3, 6)["input_ids"]
    assert_same(*both.run(input_ids=ids, labels=ids))
    masked = ids.masked_fill(torch.arange(6) < 2, -100)
    assert_same(*both.run(input_ids=ids, labels=masked))
    assert len(both.graph.captures) == 2
