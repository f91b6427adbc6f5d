"""A small model of transformers' as a GGUF file: ``base_gguf.py BASE OUT.gguf``.

It runs in the readers' environment, with the gguf package, whose table of names it goes by; so it
also tells whether our own table agrees. Rows are ordered as llama.cpp's converter does.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

# llama.cpp's architecture, the key of the config for the rows of q and k, what is added to norms.
KINDS = {
    "llama": ("llama", True, 0),
    "mistral": ("llama", True, 0),
    "qwen2": ("qwen2", False, 0),
    "qwen3": ("qwen3", False, 0),
    "gemma2": ("gemma2", False, 1),
    "phi3": ("phi3", False, 0),
}


def interleaved(value: np.ndarray, heads: int) -> np.ndarray:
    """The halves of each head's rows, taken in turns."""
    half = len(value) // heads // 2
    order = [
        h * 2 * half + part * half + n for h in range(heads) for n in range(half) for part in (0, 1)
    ]
    return value[order]


def main(base: Path, out: str) -> None:
    """Convert one model."""
    config = json.loads((base / "config.json").read_text())
    name, is_interleaved, shift = KINDS[config["model_type"]]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(out, name)
    writer.add_context_length(128)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(size)
    writer.add_vocab_size(config["vocab_size"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if name in ("gemma2", "phi3"):
        writer.add_sliding_window(config["sliding_window"] or 0)
        writer.add_rope_scaling_orig_ctx_len(128)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(config["vocab_size"] - 3))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *([6] * (len(tokens) - 3))])
    architecture = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[name]
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for full, stored in load_file(base / "model.safetensors").items():
        value = stored.astype(np.float32)
        if is_interleaved and ("q_proj" in full or "k_proj" in full):
            value = interleaved(value, heads if "q_proj" in full else kv_heads)
        if full.endswith("norm.weight"):
            value = value + np.float32(shift)
        place = names.get_name(full, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise SystemExit(f"llama.cpp has no tensor for {full}")
        writer.add_tensor(place, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


main(Path(sys.argv[1]), sys.argv[2])
