"""Which linear is what in every model of the zoo, written by hand from the models' own code.

``#`` stands for the layer numbers 0 and 1. Every linear, stack of experts and embedding of a model
is listed, those without a role under "", so that a miss and a false find both fail. A fused weight
is listed as a whole, and by part as ``Part(name, rows)`` where ``rows`` picks from the row numbers
of the weight as the modeling code picks from its output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """Rows of a fused weight."""

    module: str
    size: int
    pick: Callable[[Rows], Rows]

    def rows(self) -> tuple[int, ...]:
        """The row numbers."""
        return tuple(sorted(self.pick(np.arange(self.size)).ravel().tolist()))


@dataclass(frozen=True)
class Core:
    """What is true of the attention of a layer."""

    causal: bool
    kind: str = "self"
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 8


Roles = dict[str, tuple[str | Part, ...]]


@dataclass(frozen=True)
class Expected:
    """The roles of a model's weights and the facts of its attention, by module."""

    roles: Roles
    cores: dict[str, Core]


def under(prefix: str, **roles: str | Part | tuple[str | Part, ...]) -> Roles:
    """Roles by keyword (attn_q for attn.q, none for no role) of modules beneath a prefix."""
    made: Roles = {}
    for role, found in roles.items():
        several = found if isinstance(found, tuple) else (found,)
        family, _, rest = role.partition("_")
        key = f"{family}.{rest}" if family in ("attn", "ffn", "embed", "moe", "ssm") else role
        key = "" if role == "none" else key
        made[key] = tuple(_under(prefix, entry) for entry in several)
    return made


def _under(prefix: str, entry: str | Part) -> str | Part:
    join = f"{prefix}." if prefix else ""
    if isinstance(entry, Part):
        return Part(join + entry.module, entry.size, entry.pick)
    return join + entry


def merge(*tables: Roles) -> Roles:
    """All the roles of several tables."""
    made: Roles = {}
    for table in tables:
        for role, entries in table.items():
            made[role] = made.get(role, ()) + entries
    return made


def thirds(module: str) -> dict[str, str | Part]:
    """q, k and v one after the other, each of 32 rows."""
    return {
        "attn_qkv": module,
        "attn_q": Part(module, 96, lambda r: r[:32]),
        "attn_k": Part(module, 96, lambda r: r[32:64]),
        "attn_v": Part(module, 96, lambda r: r[64:]),
    }


def by_head(module: str) -> dict[str, str | Part]:
    """Four heads, each with 8 rows of q, 8 of k and 8 of v."""
    return {
        "attn_qkv": module,
        "attn_q": Part(module, 96, lambda r: r.reshape(4, 3, 8)[:, 0]),
        "attn_k": Part(module, 96, lambda r: r.reshape(4, 3, 8)[:, 1]),
        "attn_v": Part(module, 96, lambda r: r.reshape(4, 3, 8)[:, 2]),
    }


def llama_layer(experts: bool = False) -> Roles:
    """The layer of Llama and its many relatives."""
    attention = under(
        "model.layers.#.self_attn",
        attn_q="q_proj",
        attn_k="k_proj",
        attn_v="v_proj",
        attn_o="o_proj",
    )
    mlp = under("model.layers.#.mlp", ffn_gate="gate_proj", ffn_up="up_proj", ffn_down="down_proj")
    moe = under(
        "model.layers.#.mlp",
        ffn_gate_up="experts.gate_up_proj",
        ffn_down="experts.down_proj",
        moe_router="gate",
    )
    return merge(
        attention,
        moe if experts else mlp,
        under("", embed_tokens="model.embed_tokens", lm_head="lm_head"),
    )


def bert_layer(prefix: str) -> Roles:
    """The layer of BERT and RoBERTa, and their embeddings."""
    return merge(
        under(
            f"{prefix}.encoder.layer.#",
            attn_q="attention.self.query",
            attn_k="attention.self.key",
            attn_v="attention.self.value",
            attn_o="attention.output.dense",
            ffn_up="intermediate.dense",
            ffn_down="output.dense",
        ),
        under(
            f"{prefix}.embeddings",
            embed_tokens="word_embeddings",
            embed_types="token_type_embeddings",
            embed_positions="position_embeddings",
        ),
    )


def falcon(fused: dict[str, str | Part]) -> Roles:
    """The layer of Falcon around one of its fused projections."""
    return merge(
        under("transformer.h.#.self_attention", **fused, attn_o="dense"),
        under("transformer.h.#.mlp", ffn_up="dense_h_to_4h", ffn_down="dense_4h_to_h"),
        under("", embed_tokens="transformer.word_embeddings", lm_head="lm_head"),
    )


def t5(**feed: str) -> Roles:
    """T5; the position table is only in the first layer of each stack."""
    attention = {"attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_o": "o"}
    return merge(
        under("encoder.block.#.layer.0.SelfAttention", **attention),
        under("encoder.block.#.layer.1.DenseReluDense", **feed),
        under("decoder.block.#.layer.0.SelfAttention", **attention),
        under("decoder.block.#.layer.1.EncDecAttention", **attention),
        under("decoder.block.#.layer.2.DenseReluDense", **feed),
        under(
            "",
            lm_head="lm_head",
            embed_tokens=("encoder.embed_tokens", "decoder.embed_tokens"),
            embed_positions=(
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
                "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
            ),
        ),
    )


def bart() -> Roles:
    """BART: an encoder, and a decoder that attends to it."""
    attention = {
        "attn_q": "q_proj",
        "attn_k": "k_proj",
        "attn_v": "v_proj",
        "attn_o": "out_proj",
    }
    return merge(
        under("model.encoder.layers.#.self_attn", **attention),
        under("model.encoder.layers.#", ffn_up="fc1", ffn_down="fc2"),
        under("model.decoder.layers.#.self_attn", **attention),
        under("model.decoder.layers.#.encoder_attn", **attention),
        under("model.decoder.layers.#", ffn_up="fc1", ffn_down="fc2"),
        under(
            "",
            lm_head="lm_head",
            embed_tokens=("model.encoder.embed_tokens", "model.decoder.embed_tokens"),
            embed_positions=("model.encoder.embed_positions", "model.decoder.embed_positions"),
        ),
    )


def deberta(*positions: str) -> Roles:
    """DeBERTa-v2: position terms have projections of their own, or use those of the content."""
    return merge(
        under(
            "deberta.encoder.layer.#",
            attn_q="attention.self.query_proj",
            attn_k="attention.self.key_proj",
            attn_v="attention.self.value_proj",
            attn_o="attention.output.dense",
            ffn_up="intermediate.dense",
            ffn_down="output.dense",
            none=tuple(f"attention.self.{name}" for name in positions),
        ),
        under(
            "",
            embed_tokens="deberta.embeddings.word_embeddings",
            embed_positions="deberta.embeddings.position_embeddings",
            none="pooler.dense",
            head="classifier",
        ),
    )


SPLIT = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj"}
GROUPED = Core(causal=True, kv_heads=2)
FFN = {"ffn_up": "dense_h_to_4h", "ffn_down": "dense_4h_to_h"}
LLAMA = {"model.layers.#.self_attn": GROUPED}

EXPECTED: dict[str, Expected] = {
    "bert": Expected(
        merge(bert_layer("bert"), under("", none="bert.pooler.dense", head="classifier")),
        {"bert.encoder.layer.#.attention": Core(causal=False)},
    ),
    "bert_mlm": Expected(
        merge(
            bert_layer("bert"),
            under("cls.predictions", none="transform.dense", lm_head="decoder"),
        ),
        {"bert.encoder.layer.#.attention": Core(causal=False)},
    ),
    "roberta": Expected(
        merge(bert_layer("roberta"), under("classifier", none="dense", head="out_proj")),
        {"roberta.encoder.layer.#.attention": Core(causal=False)},
    ),
    "gpt2": Expected(
        merge(
            under("transformer.h.#.attn", **thirds("c_attn"), attn_o="c_proj"),
            under("transformer.h.#.mlp", ffn_up="c_fc", ffn_down="c_proj"),
            under("transformer", embed_tokens="wte", embed_positions="wpe"),
            under("", lm_head="lm_head"),
        ),
        {"transformer.h.#.attn": Core(causal=True)},
    ),
    "opt": Expected(
        merge(
            under("model.decoder.layers.#.self_attn", **SPLIT, attn_o="out_proj"),
            under("model.decoder.layers.#", ffn_up="fc1", ffn_down="fc2"),
            under("model.decoder", embed_tokens="embed_tokens", embed_positions="embed_positions"),
            under("", lm_head="lm_head"),
        ),
        {"model.decoder.layers.#.self_attn": Core(causal=True)},
    ),
    "llama": Expected(llama_layer(), LLAMA),
    "qwen3": Expected(llama_layer(), LLAMA),
    "gemma2": Expected(llama_layer(), LLAMA),
    "gemma3": Expected(llama_layer(), LLAMA),
    "mixtral": Expected(llama_layer(experts=True), LLAMA),
    "phi3": Expected(
        merge(
            under(
                "model.layers.#.self_attn",
                attn_qkv="qkv_proj",
                attn_q=Part("qkv_proj", 64, lambda r: r[:32]),
                attn_k=Part("qkv_proj", 64, lambda r: r[32:48]),
                attn_v=Part("qkv_proj", 64, lambda r: r[48:]),
                attn_o="o_proj",
            ),
            under(
                "model.layers.#.mlp",
                ffn_gate_up="gate_up_proj",
                ffn_gate=Part("gate_up_proj", 96, lambda r: r[:48]),
                ffn_up=Part("gate_up_proj", 96, lambda r: r[48:]),
                ffn_down="down_proj",
            ),
            under("", embed_tokens="model.embed_tokens", lm_head="lm_head"),
        ),
        LLAMA,
    ),
    "falcon_7b": Expected(
        falcon(
            {
                "attn_qkv": "query_key_value",
                "attn_q": Part("query_key_value", 48, lambda r: r[:32]),
                "attn_k": Part("query_key_value", 48, lambda r: r[32:40]),
                "attn_v": Part("query_key_value", 48, lambda r: r[40:]),
            }
        ),
        {"transformer.h.#.self_attention": Core(causal=True, kv_heads=1)},
    ),
    "falcon_40b": Expected(
        falcon(
            {
                "attn_qkv": "query_key_value",
                "attn_q": Part("query_key_value", 64, lambda r: r.reshape(2, 4, 8)[:, :-2]),
                "attn_k": Part("query_key_value", 64, lambda r: r.reshape(2, 4, 8)[:, -2]),
                "attn_v": Part("query_key_value", 64, lambda r: r.reshape(2, 4, 8)[:, -1]),
            }
        ),
        {"transformer.h.#.self_attention": Core(causal=True, kv_heads=2)},
    ),
    "falcon_1b": Expected(
        falcon(by_head("query_key_value")),
        {"transformer.h.#.self_attention": Core(causal=True)},
    ),
    "gpt_neox": Expected(
        merge(
            under("gpt_neox.layers.#.attention", **by_head("query_key_value"), attn_o="dense"),
            under("gpt_neox.layers.#.mlp", **FFN),
            under("", embed_tokens="gpt_neox.embed_in", lm_head="lm_head"),
        ),
        {"gpt_neox.layers.#.attention": Core(causal=True)},
    ),
    "bloom": Expected(
        merge(
            under("transformer.h.#.self_attention", **by_head("query_key_value"), attn_o="dense"),
            under("transformer.h.#.mlp", **FFN),
            under("", embed_tokens="transformer.word_embeddings", lm_head="lm_head"),
        ),
        {"transformer.h.#.self_attention": Core(causal=True)},
    ),
    "t5": Expected(
        t5(ffn_up="wi", ffn_down="wo"),
        {
            "encoder.block.#.layer.0.SelfAttention": Core(causal=False),
            "decoder.block.#.layer.0.SelfAttention": Core(causal=True),
            "decoder.block.#.layer.1.EncDecAttention": Core(causal=False, kind="cross"),
        },
    ),
    "t5_gated": Expected(
        t5(ffn_gate="wi_0", ffn_up="wi_1", ffn_down="wo"),
        {
            "encoder.block.#.layer.0.SelfAttention": Core(causal=False),
            "decoder.block.#.layer.0.SelfAttention": Core(causal=True),
            "decoder.block.#.layer.1.EncDecAttention": Core(causal=False, kind="cross"),
        },
    ),
    "bart": Expected(
        bart(),
        {
            "model.encoder.layers.#.self_attn": Core(causal=False),
            "model.decoder.layers.#.self_attn": Core(causal=True),
            "model.decoder.layers.#.encoder_attn": Core(causal=False, kind="cross"),
        },
    ),
    "vit": Expected(
        merge(
            under("vit.layers.#.attention", **SPLIT, attn_o="o_proj"),
            under("vit.layers.#.mlp", ffn_up="fc1", ffn_down="fc2"),
            under("", head="classifier"),
        ),
        {"vit.layers.#.attention": Core(causal=False)},
    ),
    "deberta": Expected(deberta(), {"deberta.encoder.layer.#.attention": Core(causal=False)}),
    "deberta_unshared": Expected(
        deberta("pos_key_proj", "pos_query_proj"),
        {"deberta.encoder.layer.#.attention": Core(causal=False)},
    ),
    "resnet": Expected(under("", head="classifier.1"), {}),
    "transformer_encoder": Expected(
        merge(
            under("layers.#.self_attn", **thirds("in_proj_weight"), attn_o="out_proj"),
            under("layers.#", ffn_up="linear1", ffn_down="linear2"),
        ),
        {"layers.#.self_attn": Core(causal=False)},
    ),
    "functional": Expected(
        under(
            "stack.#",
            attn_q="a1",
            attn_k="a2",
            attn_v="a3",
            attn_o="a4",
            ffn_gate="m1",
            ffn_up="m2",
            ffn_down="m3",
        ),
        {"stack.#": Core(causal=True)},
    ),
    "preceded": Expected(
        merge(
            under("layers.#.0", **thirds("into"), attn_o="out"),
            under("layers.#.1.net", ffn_up="1", ffn_down="3"),
            under("", head="last"),
        ),
        {"layers.#.0": Core(causal=False)},
    ),
    "two_lists": Expected(
        merge(
            under("mixers.#", **thirds("into"), attn_o="out"),
            under("feeds.#.net", ffn_up="1", ffn_down="3"),
            under("heads.#.net", none=("1", "3")),
        ),
        {"mixers.#": Core(causal=False)},
    ),
    "swin": Expected(
        merge(
            under("swin.encoder.layers.#.blocks.0.attention", **SPLIT, attn_o="o_proj"),
            under("swin.encoder.layers.#.blocks.1.attention", **SPLIT, attn_o="o_proj"),
            under("swin.encoder.layers.#.blocks.0.mlp", ffn_up="fc1", ffn_down="fc2"),
            under("swin.encoder.layers.#.blocks.1.mlp", ffn_up="fc1", ffn_down="fc2"),
            under("", none="swin.encoder.layers.0.downsample.reduction", head="classifier"),
        ),
        {
            "swin.encoder.layers.0.blocks.#.attention": Core(causal=False, heads=2, kv_heads=2),
            "swin.encoder.layers.1.blocks.#.attention": Core(causal=False),
        },
    ),
    "gptj": Expected(
        merge(
            under("transformer.h.#.attn", **SPLIT, attn_o="out_proj"),
            under("transformer.h.#.mlp", ffn_up="fc_in", ffn_down="fc_out"),
            under("", embed_tokens="transformer.wte", lm_head="lm_head"),
        ),
        {"transformer.h.#.attn": Core(causal=True)},
    ),
    "mamba": Expected(
        merge(
            under(
                "backbone.layers.#.mixer",
                ssm_in="in_proj",
                ssm_x="x_proj",
                ssm_dt="dt_proj",
                ssm_out="out_proj",
            ),
            under("", embed_tokens="backbone.embeddings", lm_head="lm_head"),
        ),
        {},
    ),
    "codegen": Expected(  # four groups of rows, each with 8 of q, then v, then k
        merge(
            under(
                "transformer.h.#.attn",
                attn_qkv="qkv_proj",
                attn_q=Part("qkv_proj", 96, lambda r: r.reshape(4, 3, 8)[:, 0]),
                attn_v=Part("qkv_proj", 96, lambda r: r.reshape(4, 3, 8)[:, 1]),
                attn_k=Part("qkv_proj", 96, lambda r: r.reshape(4, 3, 8)[:, 2]),
                attn_o="out_proj",
            ),
            under("transformer.h.#.mlp", ffn_up="fc_in", ffn_down="fc_out"),
            under("", embed_tokens="transformer.wte", lm_head="lm_head"),
        ),
        {"transformer.h.#.attn": Core(causal=True)},
    ),
}
