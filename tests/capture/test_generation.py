"""Generation with a captured model: the tokens and the logits of the original, its own cache used.

The oracle is the original class; for operated models it is peft's model in the same process.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import peftsurgery as ps
from tests.models.zoo import ZOO, ids

NEW = 8
LEFT_PADDED = [[0, 0, 0, 0, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]]


@cache
def original(name: str) -> nn.Module:
    """A model of the zoo that uses a cache, as most do."""
    module = ZOO[name].build()
    module.config.use_cache = module.generation_config.use_cache = True
    module.generation_config.pad_token_id = 0
    return module


@cache
def remembering(name: str) -> ps.GraphModel:
    """Its capture; tests may add captures to it and change nothing else."""
    return ps.capture(original(name), cache=True)


def prompts() -> dict[str, Tensor]:
    return {"input_ids": ids(3, 7), "attention_mask": torch.tensor(LEFT_PADDED)}


def tokens(model: Any, **settings: Any) -> Tensor:
    """What a model makes of the prompts, the same random numbers drawn every time."""
    torch.manual_seed(0)
    made: Tensor = model.generate(**prompts(), max_new_tokens=NEW, **settings)
    return made


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20},
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bloom"])
def test_it_gives_the_originals_tokens(name: str) -> None:
    for settings in WAYS.values():
        expected = tokens(original(name), **settings)
        assert torch.equal(tokens(remembering(name), **settings), expected), settings


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bloom"])
@pytest.mark.parametrize("padded", [True, False])
def test_prefill_and_every_step_are_exact(name: str, padded: bool) -> None:
    mask = torch.tensor(LEFT_PADDED) if padded else torch.ones(3, 7, dtype=torch.long)
    theirs, mine = DynamicCache(config=original(name).config), None
    fed = ids(3, 7)
    for step in range(4):
        with torch.no_grad():
            expected = original(name)(fed, attention_mask=mask, past_key_values=theirs)
            outputs = remembering(name)(fed, attention_mask=mask, past_key_values=mine)
        assert torch.equal(outputs.logits, expected.logits), step
        assert type(outputs) is type(expected)
        assert mine in (None, outputs.past_key_values)
        mine = outputs.past_key_values
        for layer, other in zip(mine.layers, theirs.layers, strict=True):
            assert type(layer) is type(other)
            assert layer.get_seq_length() == other.get_seq_length()
            assert torch.equal(layer.keys, other.keys)
        fed = ids(3, step + 1)[:, -1:] if step < 2 else ids(3, 3)
        mask = torch.cat([mask, torch.ones_like(fed)], dim=1)
