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
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetModel,
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
EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
OTHERS = {
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, **PLAIN, **EXPERTS, num_hidden_layers=2)
    ),
    "resnet": lambda: ResNetModel(ResNetConfig(**STAGES)),
}
"""Models with what the others lack: experts, convolutions."""


@cache
def real(name: str) -> ps.GraphModel:
    """The capture; not to be changed."""
    torch.manual_seed(0)
    return ps.capture({**MAKERS, **OTHERS}[name]().eval())


@cache
def described(name: str) -> Description:
    """What it is."""
    return describe_model(real(name))
