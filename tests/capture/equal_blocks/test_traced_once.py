"""Each distinct block is traced once, and the graph is the one that tracing all of them makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaAttention

import peftsurgery as ps
from peftsurgery.capture.equal_blocks.traced_once import Once
from tests.models import blocks
from tests.models.changing_blocks import CHANGING
from tests.models.traces import cached, compared, deeper, traced
from tests.models.zoo import entry


class Numbered(LlamaAttention):
    """Hands its number to the cache, and multiplies by it."""

    def forward(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        states, weights = super().forward(hidden_states, *args, **named)
        return states * self.layer_idx, weights


class Twice(blocks.Stack):
    """Calls each block twice in a row."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(block(x))
        return x


class Recomputed(blocks.Stack):
    """Its blocks are computed once more in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class Values(blocks.Block):
    """Multiplies by a number that is read of a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.sum().item()


class Sizes(blocks.Block):
    """Adds a size that depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.nonzero(x).shape[0]


class Counted(blocks.Block):
    """Has a batch norm, and counts its calls in a buffer."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.norm(super().forward(x).mT).mT * self.calls


class Halves(blocks.Block):
    """Returns half as many rows as it is given."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return super().forward(left) + right


# How many of a trap's blocks do what one before them does.
LIKE_ANOTHER = {"Windows": 1, "Marks": 2, "Graded": 2}


@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_the_graph_is_the_plain_traces(name: str) -> None:
    module = deeper(name, 3).train()
    assert compared(module, entry(name).inputs(2, 6))


def test_labels_have_the_plain_traces_graph() -> None:
    inputs = entry("gpt2").inputs(2, 6)
    assert compared(deeper("gpt2", 3).eval(), {**inputs, "labels": inputs["input_ids"]})


WANTED = {"output_hidden_states": True, "output_attentions": True}


@pytest.mark.parametrize("wanted", WANTED)
def test_what_transformers_collects_of_blocks_is_the_plain_traces(wanted: str) -> None:
    module: Any = deeper("llama", 4).eval()
    module.set_attn_implementation("eager")
    filled = compared(module, {**entry("llama").inputs(2, 6), wanted: True})
    assert filled == ("model.layers.2", "model.layers.3")


def test_what_is_collected_of_some_layers_only_is_traced() -> None:
    module = deeper("llama", 4).eval()
    assert compared(module, {**entry("llama").inputs(2, 6), "output_hidden_states": [2]}) == ()


def test_hooks_for_which_nothing_collects_leave_blocks_equal() -> None:
    module, inputs = deeper("llama", 4).eval(), entry("llama").inputs(2, 6)
    module(**inputs, output_hidden_states=True)
    assert {"model.layers.2", "model.layers.3"} <= set(compared(module, inputs))


@pytest.mark.parametrize("past", [0, 5], ids=["prefill", "decode"])
def test_a_block_names_its_layer_of_the_cache(past: int) -> None:
    module = deeper("llama", 4).eval()
    filled = compared(module, cached(module, past))
    assert {"model.layers.2", "model.layers.3"} <= set(filled)


@pytest.mark.slow
def test_layers_with_a_window_are_equal_blocks() -> None:
    module: Any = deeper("gemma3", 4).eval()
    filled = compared(module, cached(module, 0))
    assert {"model.layers.2", "model.layers.3"} <= set(filled)


@pytest.mark.slow
def test_layers_of_the_cache_may_be_in_another_order() -> None:
    module: Any = deeper("llama", 4).eval()
    third, fourth = module.model.layers[2].self_attn, module.model.layers[3].self_attn
    third.layer_idx, fourth.layer_idx = 3, 2
    assert {"model.layers.2", "model.layers.3"} <= set(compared(module, cached(module, 0)))


def test_a_number_that_is_more_than_a_layers_is_read() -> None:
    module: Any = deeper("llama", 4).eval()
    for layer in module.model.layers:
        layer.self_attn.__class__ = Numbered
    assert compared(module, cached(module, 0)) == ()


def test_equal_blocks_are_filled_in() -> None:
    filled = compared(blocks.Stack(blocks.Block).train(), {"x": torch.randn(2, 3, 8)})
    assert set(filled) >= {f"blocks.{number}" for number in range(2, blocks.COUNT)}


@pytest.mark.slow  # by their number
@pytest.mark.parametrize("kind", [*blocks.TRAPS, *CHANGING], ids=lambda kind: kind.__name__)
def test_a_block_that_is_not_like_others_is_traced(kind: type[blocks.Block]) -> None:
    module = blocks.Stack(kind).train()
    filled = compared(module, {"x": torch.randn(2, 3, 8)})
    assert len(filled) <= LIKE_ANOTHER.get(kind.__name__, 0)


def test_equal_lists_are_equal_blocks() -> None:
    module: Any = blocks.Stack(blocks.Lists)
    for block in module.blocks:
        block.factors = [1.5, 0.5]
    assert len(compared(module, {"x": torch.randn(2, 3, 8)})) >= blocks.COUNT - 2


def test_a_block_with_a_hook_in_it_is_traced() -> None:
    module = blocks.Stack(blocks.Block)
    part = module.get_submodule("blocks.3.inner")
    part.register_forward_hook(lambda part, args, result: result * 2)
    assert "blocks.3" not in compared(module, {"x": torch.randn(2, 3, 8)})


def test_a_block_with_a_forward_of_its_own_is_traced() -> None:
    module = blocks.Stack(blocks.Block)
    part: Any = module.get_submodule("blocks.3.outer")
    part.forward = lambda x: x[..., :8]
    assert "blocks.3" not in traced(module, {"x": torch.randn(2, 3, 8)}, True).exported.filled


def test_blocks_that_share_a_weight_are_no_blocks_that_do_not() -> None:
    module: Any = blocks.Stack(blocks.Block)
    for number in (2, 3):
        module.blocks[number].inner.weight = module.blocks[0].inner.weight
    compared(module, {"x": torch.randn(2, 3, 8)})


@pytest.mark.parametrize("stack", [Twice, Recomputed], ids=lambda kind: kind.__name__)
def test_blocks_are_filled_in_however_they_are_called(stack: type[blocks.Stack]) -> None:
    filled = compared(stack(blocks.Block).train(), {"x": torch.randn(2, 3, 8)})
    assert {"blocks.2", "blocks.3"} <= set(filled)


def test_a_block_whose_parts_are_of_another_too_is_traced() -> None:
    module: Any = blocks.Stack(blocks.Block)
    module.blocks[1].inner, module.blocks[3].inner = module.blocks[0].inner, module.blocks[2].inner
    assert compared(module, {"x": torch.randn(2, 3, 8)}) == ()


@pytest.mark.parametrize("kind", [Values, Sizes], ids=lambda kind: kind.__name__)
def test_a_block_that_makes_a_number_of_values_is_traced(kind: type[blocks.Block]) -> None:
    assert compared(blocks.Stack(kind), {"x": torch.randn(2, 3, 8)}) == ()


def test_norms_that_count_and_keep_statistics_are_filled_in() -> None:
    """What the sizes are asked has the plain trace's answers, and no condition is added."""
    filled = compared(blocks.Stack(Counted).train(), {"x": torch.randn(2, 3, 8)})
    assert filled == ("blocks.2", "blocks.3")


def test_blocks_that_halve_their_input_are_all_traced() -> None:
    assert compared(blocks.Stack(Halves), {"x": torch.randn(2, 32, 8)}) == ()


def test_the_classes_are_left_as_they_were() -> None:
    before = dict(vars(blocks.Asks)), dict(vars(nn.Linear))
    traced(blocks.Stack(blocks.Asks), {"x": torch.randn(2, 3, 8)}, True)
    assert (dict(vars(blocks.Asks)), dict(vars(nn.Linear))) == before


@pytest.mark.slow
def test_a_model_that_keeps_a_cache_of_two_is_captured() -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, vocab_size=40, decoder_start_token_id=0))
    assert model.config.use_cache
    graph = ps.capture(model.eval())
    inputs = {name: torch.randint(1, 40, (3, 5)) for name in ("input_ids", "decoder_input_ids")}
    with torch.no_grad():
        assert torch.equal(graph(**inputs).logits, model(**inputs).logits)


def test_what_fails_with_equal_blocks_is_traced_block_by_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failed = list[str]()

    def fails(self: Once, *args: Any, **kwargs: Any) -> Any:
        failed.append("here")
        raise AttributeError("a fault of ours")

    monkeypatch.setattr(Once, "call", fails)
    model, x = blocks.Stack(blocks.Block).eval(), torch.randn(3, 8)
    graph = ps.capture(model, inputs=(torch.randn(2, 8),))
    assert failed
    with torch.no_grad():
        assert torch.equal(graph(x), model(x))
