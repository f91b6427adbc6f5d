"""Small configs for the sweep: sizes by the names that configs give them, and repaired ones.

A config of defaults with small numbers put into it is unfit where its numbers must go together in a
way that their names do not say; those of popular architectures are written out here.
"""

from __future__ import annotations

from typing import Any

# Names that configs give to their sizes, and small values that go together.
SMALL: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), 32),
    **dict.fromkeys(("emb_dim", "entity_emb_size", "hidden_size_global"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "n_inner", "hidden_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("num_experts_per_token",), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("num_expert_group", "num_shared_experts"), 1),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_state", "mamba_num_heads", "mamba_head_dim"), 8),
    "word_embed_proj_dim": 32,
    **dict.fromkeys(("vocab_size", "n_words", "entity_vocab_size", "shape_vocab_size"), 99),
    **dict.fromkeys(("pronunciation_vocab_size", "vocab_size_per_layer_input"), 99),
    **dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), 8),
    "sliding_window": 4,
    "image_size": 64,
    "mm_tokens_per_image": 4,
    "num_filters": 4,
    "num_patches": 16,
}
SHORT = ("depths", "num_blocks", "encoder_depths")
"""Lists with a number for each stage of a network: of layers, two or one."""
FILLED = ("vocab_size", "head_dim", "n_routed_experts", "n_shared_experts", "num_experts_per_tok")
"""Sizes that are given even where the default is None, which not every model can be made with."""
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    **SPECIAL,
}
_LATENT: dict[str, Any] = {
    **_TEXT,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_PAIR: dict[str, Any] = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 0,
    "max_position_embeddings": 64,
    **SPECIAL,
}
_EXPERTS: dict[str, Any] = {**_TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}
_MIXED: dict[str, Any] = {
    **_TEXT,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_SHARED: dict[str, Any] = {
    **_TEXT,
    "head_dim": 8,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 99,
    "hidden_size_per_layer_input": 8,
}

_WINDOWS: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}

MIXED: dict[str, dict[str, Any]] = {
    "instructblip": {"image_token_index": 3},
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
}
"""What goes with small values: what makes one of two layers attention, in models whose first ones
are another mixer, and tokens of a small vocabulary."""

REPAIRED: dict[str, dict[str, Any]] = {
    "clap": {
        "projection_dim": 16,
        "text_config": {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "projection_dim": 16,
        },
        "audio_config": {
            "spec_size": 64,
            "window_size": 4,
            "num_mel_bins": 16,
            "patch_embeds_hidden_size": 16,
            "hidden_size": 32,
            "depths": [2, 2],
            "num_attention_heads": [2, 4],
            "num_hidden_layers": 2,
            "projection_dim": 16,
        },
    },
    "bailing_hybrid": {**_LATENT, "head_dim": 8, "layer_group_size": 2, "num_local_experts": 4},
    "cohere_compass_text": {
        **_TEXT,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "cvt": {
        "depth": [1, 2, 3],
        "embed_dim": [16, 32, 32],
        "num_heads": [1, 2, 4],
        "image_size": 64,
    },
    "donut-swin": _WINDOWS,
    "efficientnet": {"depth_coefficient": 0.3, "hidden_dim": 1280, "width_coefficient": 1.0},
    "maskformer-swin": _WINDOWS,
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "esm": {**_TEXT, "mask_token_id": 4},
    "lfm2_moe": {
        **_TEXT,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
    },
    "mamba2": {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 2,
        "state_size": 8,
        "chunk_size": 4,
        **SPECIAL,
    },
    "neomme": {**_TEXT, "head_dim": 16, "embedding_rank": 8, "patch_size": 4, "embedding_dim": 8},
    "xmod": {**_TEXT, "languages": ["en_XX"], "default_language": "en_XX", "is_decoder": True},
    "zamba": {**_TEXT, "layers_block_type": ["hybrid", "mamba", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {
        **_TEXT,
        "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid"],
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "adapter_rank": 8,
        "chunk_size": 4,
    },
    "zaya": {
        **_TEXT,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "router_hidden_size": 16,
    },
    "reformer": {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "attention_head_size": 8,
        "feed_forward_size": 64,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 4,
        "axial_pos_shape": [4, 8],
        "axial_pos_embds_dim": [16, 16],
        "max_position_embeddings": 32,
        "is_decoder": True,
    },
    "deepseek_v2": {**_LATENT, "topk_method": "greedy"},
    "deepseek_v3": _LATENT,
    "glm4_moe_lite": _LATENT,
    "minicpm3": _LATENT,
    "youtu": _LATENT,
    "gemma3n_text": {
        **_SHARED,
        "intermediate_size": [64] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
    },
    "gemma4_text": {**_SHARED, "global_head_dim": 8},
    "prophetnet": {
        "vocab_size": 99,
        "hidden_size": 32,
        "encoder_ffn_dim": 64,
        "num_encoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "decoder_ffn_dim": 64,
        "num_decoder_layers": 2,
        "num_decoder_attention_heads": 4,
    },
    "pegasus_x": {**_PAIR, "block_size": 4, "num_global_tokens": 2},
    "big_bird": {**_TEXT, "attention_type": "original_full"},
    "jetmoe": {**_EXPERTS, "kv_channels": 8},
    "mixtral": _EXPERTS,
    "qwen2_moe": {
        **_TEXT,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "gpt_oss": {**_EXPERTS, "head_dim": 8},
    "llama4_text": {**_EXPERTS, "head_dim": 8, "intermediate_size_mlp": 64},
    "qwen3_5_text": _MIXED,
    "minimax": {**_EXPERTS, "head_dim": 8, "layer_types": _MIXED["layer_types"]},
    "siglip_vision_model": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 16,
        "patch_size": 8,
    },
    "mllama_text_model": {**_TEXT, "cross_attention_layers": [1]},
    "gptj": {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "codegen": {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "gpt_neo": {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 64,
    },
    "falcon": {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "nemotron": {**_TEXT, "head_dim": 8},
    "olmoe": {**_TEXT, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_TEXT,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "qwen3_next": {**_MIXED, "num_experts": 0, "mlp_only_layers": [0, 1]},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "vocab_size": 99,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
}
