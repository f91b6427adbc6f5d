"""Models of the zoo that use a cache, beside their captures, for tests of generation."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import peftsurgery as ps
from tests.models.zoo import ZOO, ids

# The name that models have for their cache, in the installed version of transformers.
ARGUMENTS = inspect.signature(LlamaForCausalLM.forward).parameters
PAST = next(name for name in ("cache", "past_key_values") if name in ARGUMENTS)
LEFT_PADDED = [[0, 0, 0, 0, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20},
}


@cache
def original(name: str) -> Any:
    """The model; not to be changed."""
    module: Any = ZOO[name].build()
    module.config.use_cache = module.generation_config.use_cache = True
    module.generation_config.pad_token_id = 0
    return module


@cache
def remembering(name: str) -> ps.GraphModel:
    """Its capture; tests may add captures to it and change nothing else."""
    return ps.capture(original(name), cache=True)


def prompts() -> dict[str, Tensor]:
    """Three prompts of unequal lengths, padded on the left."""
    return {"input_ids": ids(3, 7), "attention_mask": torch.tensor(LEFT_PADDED)}


def tokens(model: Any, **settings: Any) -> Tensor:
    """What a model makes of the prompts, the same random numbers drawn every time."""
    torch.manual_seed(0)
    made: Tensor = model.generate(**{**prompts(), "max_new_tokens": 8, **settings})
    return made
