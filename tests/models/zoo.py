"""Small models with random weights: one entry for every architecture the suite speaks of.

``build()`` gives a seeded module in eval mode with two layers; ``inputs(batch, seq)`` gives keyword
arguments for its forward at any size of two and up (image models ignore ``seq``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.models.handwritten import Functional, Preceded, TwoLists

VOCABULARY = 99
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """A model of the zoo: how to build it and how to feed it."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]

    def build(self) -> nn.Module:
        """The model, from the same seed every time, in eval mode."""
        torch.manual_seed(0)
        module = self.make().eval()
        with torch.no_grad():  # biases and scales start at 0 and 1, which would hide mistakes
            for parameter in module.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return module


def ids(batch: int, seq: int) -> Tensor:
    """Token ids, repeatable for a size, none of them a special token of the small configs."""
    generator = torch.Generator().manual_seed(1000 * batch + seq)
    return torch.randint(5, VOCABULARY, (batch, seq), generator=generator)


def text(batch: int, seq: int) -> Inputs:
    """Ids and a mask that sees all of them."""
    tokens = ids(batch, seq)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def seq2seq(batch: int, seq: int) -> Inputs:
    """Source text, and a target prefix one token longer."""
    return {**text(batch, seq), "decoder_input_ids": ids(batch, seq + 1)}


def image(batch: int, seq: int) -> Inputs:
    """Images of 32 by 32."""
    generator = torch.Generator().manual_seed(batch)
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}


def states(name: str) -> Callable[[int, int], Inputs]:
    """Hidden states of width 32 under the given argument name."""

    def make(batch: int, seq: int) -> Inputs:
        generator = torch.Generator().manual_seed(1000 * batch + seq)
        return {name: torch.randn(batch, seq, 32, generator=generator)}

    return make


def hf(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """A maker for a transformers class from the keywords of its config."""

    def make() -> nn.Module:
        made = getattr(transformers, config)(**settings)
        module: nn.Module = getattr(transformers, model)(made)
        return module

    return make


WIDTH: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MLP: dict[str, Any] = {**WIDTH, "intermediate_size": 48, "max_position_embeddings": 64}
DECODER: dict[str, Any] = {**MLP, "use_cache": False}
GROUPED: dict[str, Any] = {**DECODER, "num_key_value_heads": 2}
FALCON: dict[str, Any] = {**WIDTH, "use_cache": False, "ffn_hidden_size": 48}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


def transformer_encoder() -> nn.Module:
    """torch's own encoder, batch first."""
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


ENTRIES = (
    Entry("bert", hf("BertForSequenceClassification", "BertConfig", **MLP), text),
    Entry("bert_mlm", hf("BertForMaskedLM", "BertConfig", **MLP), text),
    Entry("roberta", hf("RobertaForSequenceClassification", "RobertaConfig", **MLP), text),
    Entry("gpt2", hf("GPT2LMHeadModel", "GPT2Config", **GPT2), text),
    Entry(
        "opt",
        hf(
            "OPTForCausalLM",
            "OPTConfig",
            **WIDTH,
            ffn_dim=48,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
            use_cache=False,
        ),
        text,
    ),
    Entry("llama", hf("LlamaForCausalLM", "LlamaConfig", **GROUPED), text),
    Entry("qwen3", hf("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=8), text),
    Entry(
        "gemma2",
        hf("Gemma2ForCausalLM", "Gemma2Config", **GROUPED, head_dim=8, sliding_window=4),
        text,
    ),
    Entry(
        "gemma3",
        hf("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED, head_dim=8, sliding_window=4),
        text,
    ),
    Entry("phi3", hf("Phi3ForCausalLM", "Phi3Config", **GROUPED), text),
    Entry(
        "falcon_7b",
        hf("FalconForCausalLM", "FalconConfig", **FALCON, alibi=False, multi_query=True),
        text,
    ),
    Entry(
        "falcon_40b",
        hf(
            "FalconForCausalLM",
            "FalconConfig",
            **FALCON,
            alibi=False,
            new_decoder_architecture=True,
            num_kv_heads=2,
        ),
        text,
    ),
    Entry(
        "falcon_1b",
        hf(
            "FalconForCausalLM",
            "FalconConfig",
            **FALCON,
            alibi=True,
            multi_query=False,
            parallel_attn=False,
            bias=True,
        ),
        text,
    ),
    Entry("gpt_neox", hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **DECODER), text),
    Entry(
        "bloom",
        hf(
            "BloomForCausalLM",
            "BloomConfig",
            vocab_size=VOCABULARY,
            hidden_size=32,
            n_layer=2,
            n_head=4,
            use_cache=False,
        ),
        text,
    ),
    Entry(
        "mixtral",
        hf("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4),
        text,
    ),
    Entry(
        "qwen2_moe",
        hf(
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            **GROUPED,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
            num_experts=4,
            num_experts_per_tok=2,
        ),
        text,
    ),
    Entry(
        "gpt_neo",
        hf(
            "GPTNeoForCausalLM",
            "GPTNeoConfig",
            **WIDTH,
            num_layers=2,
            num_heads=4,
            intermediate_size=48,
            attention_types=[[["global", "local"], 1]],
            window_size=32,
            max_position_embeddings=64,
            use_cache=False,
        ),
        text,
    ),
    Entry(
        "openai_gpt",
        hf("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", **GPT2),
        text,
    ),
    Entry(
        "t5",
        hf(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            use_cache=False,
        ),
        seq2seq,
    ),
    Entry(
        "t5_gated",
        hf(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            use_cache=False,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        ),
        seq2seq,
    ),
    Entry(
        "bart",
        hf(
            "BartForConditionalGeneration",
            "BartConfig",
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            max_position_embeddings=64,
            use_cache=False,
        ),
        seq2seq,
    ),
    Entry("vit", hf("ViTForImageClassification", "ViTConfig", **VISION), image),
    Entry(
        "deberta",
        hf(
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            **MLP,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pooler_hidden_size=32,
        ),
        text,
    ),
    Entry(
        "deberta_unshared",
        hf(
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            **MLP,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            share_att_key=False,
            pooler_hidden_size=32,
        ),
        text,
    ),
    Entry(
        "resnet",
        hf(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[2, 2],
            layer_type="basic",
        ),
        image,
    ),
    Entry("transformer_encoder", transformer_encoder, states("src")),
    Entry("functional", Functional, states("x")),
    Entry("preceded", Preceded, states("x")),
    Entry("two_lists", TwoLists, states("x")),
    Entry(
        "swin",
        hf(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
        image,
    ),
    Entry(
        "gptj",
        hf("GPTJForCausalLM", "GPTJConfig", **GPT2, rotary_dim=4),
        text,
    ),
    Entry("codegen", hf("CodeGenForCausalLM", "CodeGenConfig", **GPT2, rotary_dim=4), text),
    Entry(
        "mamba",
        hf(
            "MambaForCausalLM",
            "MambaConfig",
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=4,
            use_cache=False,
        ),
        text,
    ),
)
ZOO = {entry.name: entry for entry in ENTRIES}


def entry(name: str) -> Entry:
    """The entry of that name."""
    return ZOO[name]
