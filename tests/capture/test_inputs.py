"""Example inputs that are made from a config, and what is said where they do not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import peftsurgery as ps
from tests.models.zoo import WIDTH

TEXT: dict[str, Any] = {**WIDTH, "intermediate_size": 48}
IMAGE: dict[str, Any] = {**TEXT, "image_size": 32, "patch_size": 8}


@pytest.mark.parametrize("kind", ["CLIP"])
def test_a_model_of_two_towers_is_given_a_text_and_an_image(kind: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(text_config=TEXT, vision_config=IMAGE)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    graph = ps.capture(model)
    inputs = {
        "input_ids": torch.randint(3, 60, (3, 6)),
        "attention_mask": torch.ones(3, 6, dtype=torch.long),
        "pixel_values": torch.randn(3, 3, 32, 32),
    }
    with torch.no_grad():
        ours, theirs = graph(**inputs), model(**inputs)
    for name in ("logits_per_image", "text_embeds", "image_embeds"):
        assert torch.equal(ours[name], theirs[name])


def held_to(model: transformers.PreTrainedModel, **inputs: torch.Tensor) -> None:
    """A capture with inputs that were made for it returns, for others, what its model returns."""
    graph = ps.capture(model.eval())
    with torch.no_grad():
        ours, theirs = graph(**inputs).logits, model(**inputs).logits
    assert len(graph.captures) == 1
    assert torch.equal(ours, theirs)


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 60, shape)


def test_every_choice_of_an_answer_is_a_text() -> None:
    torch.manual_seed(0)
    model = transformers.BertForMultipleChoice(transformers.BertConfig(**TEXT))
    mask = torch.ones(2, 4, 6, dtype=torch.long)
    mask[0, 1, 4:] = 0
    held_to(model, input_ids=ids(2, 4, 6), attention_mask=mask)


def test_streams_of_codes_of_one_sound_are_rows() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 48}
    config = transformers.MusicgenDecoderConfig(
        vocab_size=64, num_codebooks=3, pad_token_id=0, use_cache=False, **sizes
    )
    model = transformers.MusicgenForCausalLM(config)
    mask = torch.ones(4, 5, dtype=torch.long)
    held_to(model, input_ids=ids(4 * 3, 5), attention_mask=mask)


def test_a_text_that_images_go_into_goes_in_alone() -> None:
    torch.manual_seed(0)
    config = transformers.ModernVBertConfig(
        text_config={**TEXT, "model_type": "modernbert"},
        vision_config={**IMAGE, "model_type": "siglip_vision_model"},
        image_token_id=63,
    )
    model = transformers.ModernVBertForMaskedLM(config)
    held_to(model, input_ids=ids(3, 6), attention_mask=torch.ones(3, 6, dtype=torch.long))


def test_images_of_any_sides_come_in_patches() -> None:
    torch.manual_seed(0)
    vision = {**TEXT, "num_patches": 16, "patch_size": 4}
    config = transformers.Siglip2Config(text_config=TEXT, vision_config=vision)
    model = transformers.Siglip2ForImageClassification(config)
    sides = torch.tensor([[2, 7], [4, 3]])
    mask = (torch.arange(15) < sides.prod(-1, keepdim=True)).long()
    patches = torch.randn(2, 15, 48)
    held_to(model, pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=sides)


@pytest.mark.slow
def test_sound_beside_a_text_has_frames_for_each_token() -> None:
    torch.manual_seed(0)
    sound = {**TEXT, "num_mel_bins": 8, "head_dim": 8, "sliding_window": 4}
    config = transformers.VoxtralRealtimeConfig(
        text_config={**TEXT, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False},
        audio_config={**sound, "use_cache": False},
    )
    model = transformers.VoxtralRealtimeForConditionalGeneration(config)
    model.config.use_cache = False
    held_to(
        model,
        input_ids=ids(3, 6),
        attention_mask=torch.ones(3, 6, dtype=torch.long),
        input_features=torch.randn(3, 8, 6 * config.audio_length_per_tok),
    )


def test_what_was_tried_is_said() -> None:
    config = transformers.BlipConfig(text_config=TEXT, vision_config=IMAGE)
    model = transformers.BlipForConditionalGeneration(config).eval()
    with pytest.raises(ps.SurgeryError, match=r"PSG201: (.|\n)*called with pixel_values; give"):
        ps.capture(model)


def test_ids_of_another_name_are_made_where_the_forward_has_no_default_for_them() -> None:
    torch.manual_seed(0)
    config = transformers.InstructBlipConfig(
        vision_config=IMAGE,
        qformer_config={**TEXT, "encoder_hidden_size": WIDTH["hidden_size"], "vocab_size": 64},
        text_config={"model_type": "llama", **TEXT},
        num_query_tokens=2,
        image_token_index=1,
    )
    model = transformers.InstructBlipModel(config).eval()
    inputs = {
        "pixel_values": torch.randn(3, 3, 32, 32),
        "qformer_input_ids": ids(3, 6),
        "input_ids": torch.cat([torch.ones(3, 2, dtype=torch.long), ids(3, 7)], dim=1),
        "attention_mask": torch.ones(3, 9, dtype=torch.long),
    }
    graph = ps.capture(model)
    with torch.no_grad():
        ours, theirs = graph(**inputs), model(**inputs)
    assert torch.equal(ours.language_model_outputs[0], theirs.language_model_outputs[0])


def test_inputs_of_no_known_kind_are_named_all_of_them() -> None:
    config = transformers.Gemma3nAudioConfig(
        hidden_size=32, conf_num_hidden_layers=1, conf_num_attention_heads=4
    )
    model = transformers.Gemma3nAudioEncoder(config).eval()
    with pytest.raises(ps.SurgeryError, match="audio_mel and audio_mel_mask") as caught:
        ps.capture(model)
    assert caught.value.code == "PSG202"
    assert "inputs={'audio_mel': ..., 'audio_mel_mask': ...}" in str(caught.value)
