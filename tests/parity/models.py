"""Small models for comparisons with peft: no dropout, captured once each, with labels."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import peftsurgery as ps

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
DECODER = {**SIZES, "num_key_value_heads": 2, "use_cache": False}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
OPT = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "use_cache": False}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "initializer_factor": 0.3,
    "use_cache": False,
}


@dataclass(frozen=True)
class Small:
    """A model: its transformers class, its config, and what holds its query and value weights."""

    name: str
    model: str
    config: str
    settings: dict[str, Any]
    targets: tuple[str, ...]

    def build(self) -> nn.Module:
        """The model, the same every time, with weights large enough to make mistakes visible."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.settings)
        for key in vars(config):
            if "dropout" in key or key.endswith("pdrop"):
                setattr(config, key, 0.0)
        model: nn.Module = getattr(transformers, self.model)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return model


SMALL = {
    small.name: small
    for small in (
        Small("llama", "LlamaForCausalLM", "LlamaConfig", DECODER, ("q_proj", "v_proj")),
        Small("bert", "BertForMaskedLM", "BertConfig", SIZES, ("query", "value")),
        Small("gpt2", "GPT2LMHeadModel", "GPT2Config", GPT2, ("c_attn",)),
        Small("opt", "OPTForCausalLM", "OPTConfig", OPT, ("q_proj", "v_proj")),
        Small("t5", "T5ForConditionalGeneration", "T5Config", T5, ("q", "v")),
        Small("qwen3", "Qwen3ForCausalLM", "Qwen3Config", DECODER, ("q_proj", "v_proj")),
    )
}


@cache
def _built(name: str) -> nn.Module:
    return SMALL[name].build()


def base(name: str) -> nn.Module:
    """A copy of the model, to be wrapped and changed by peft."""
    return deepcopy(_built(name))


@cache
def captured(name: str) -> ps.GraphModel:
    """The captured model; not to be changed."""
    return ps.capture(_built(name), inputs=batch(2, 5))


def batch(rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Token ids and labels, without padding."""
    generator = torch.Generator().manual_seed(100 * rows + length)

    def draw() -> Tensor:
        return torch.randint(3, VOCABULARY, (rows, length), generator=generator)

    return {"input_ids": draw(), "labels": draw()}


def randomise(model: nn.Module, select: Callable[[str], bool], scale: float = 0.1) -> None:
    """Give parameters random values, so that no adapter is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if select(name):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(scale * noise)


class Attention(nn.Module):
    """torch's attention: its code reads out_proj's weight and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return result
