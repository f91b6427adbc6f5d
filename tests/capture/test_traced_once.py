"""Each distinct block is traced once, and the graph is the one that tracing all of them makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.models import blocks
from tests.models.traces import compared, deeper, traced
from tests.models.zoo import entry


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_graph_is_the_plain_traces(name: str) -> None:
    module = deeper(name, 3).train()
    assert compared(module, entry(name).inputs(2, 6))


def test_labels_have_the_plain_traces_graph() -> None:
    inputs = entry("gpt2").inputs(2, 6)
    assert compared(deeper("gpt2", 3).eval(), {**inputs, "labels": inputs["input_ids"]})


def test_equal_blocks_are_filled_in() -> None:
    filled = compared(blocks.Stack(blocks.Block).train(), {"x": torch.randn(2, 3, 8)})
    assert set(filled) >= {f"blocks.{number}" for number in range(2, blocks.COUNT)}


@pytest.mark.parametrize("kind", blocks.TRAPS, ids=lambda kind: kind.__name__)
def test_a_block_that_is_not_like_others_is_traced(kind: type[blocks.Block]) -> None:
    module = blocks.Stack(kind).train()
    alike = {"Asks": 2, "Windows": 3}.get(kind.__name__, 0)  # those that are like one before
    filled = compared(module, {"x": torch.randn(2, 3, 8)})
    assert len(filled) <= (blocks.COUNT - alike if alike else 0)


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


def test_the_classes_are_left_as_they_were() -> None:
    before = dict(vars(blocks.Asks)), dict(vars(nn.Linear))
    traced(blocks.Stack(blocks.Asks), {"x": torch.randn(2, 3, 8)}, True)
    assert (dict(vars(blocks.Asks)), dict(vars(nn.Linear))) == before
