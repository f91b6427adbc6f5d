"""The names that transformers gives to the arguments of every model of tokens."""

from __future__ import annotations

from collections.abc import Mapping

TOKENS: Mapping[str, str] = {
    "input_ids": "inputs_embeds",
    "decoder_input_ids": "decoder_inputs_embeds",
}
"""For each argument that holds token ids, the one that holds their embeddings instead."""

ARGUMENTS: Mapping[str, str] = {
    "embeds": "inputs_embeds",
    "mask": "attention_mask",
    "positions": "position_ids",
    "types": "token_type_ids",
    "labels": "labels",
    "decoder_embeds": "decoder_inputs_embeds",
    "decoder_mask": "decoder_attention_mask",
    "decoder_positions": "decoder_position_ids",
    "decoder_labels": "labels",
    "answer": "labels",
}
"""The argument that each name bound at the site of the inputs is."""

SENSES: Mapping[str, str] = {
    "pixel_values": "vision",
    "pixel_values_videos": "vision",
    "flattened_patches": "vision",
    "input_features": "audio",
    "input_values": "audio",
}
"""For each argument that holds what is seen or heard, which of the two."""
