"""Small captures of transformers' own models, each made once in a session."""

from __future__ import annotations

from functools import cache

import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import peftsurgery as ps
from peftsurgery.diff.describing import describe_model
from peftsurgery.diff.description import Description

SIZES = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
PLAIN = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
MAKERS = {
    "bert": lambda: BertModel(BertConfig(**SIZES, **PLAIN, num_hidden_layers=3)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES, n_embd=16, n_head=2, n_layer=3)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **PLAIN, num_hidden_layers=3)),
}


@cache
def real(name: str) -> ps.GraphModel:
    """The capture; not to be changed."""
    torch.manual_seed(0)
    return ps.capture(MAKERS[name]().eval())


@cache
def described(name: str) -> Description:
    """What it is."""
    return describe_model(real(name))
