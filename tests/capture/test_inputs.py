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


def test_what_was_tried_is_said() -> None:
    config = transformers.BlipConfig(text_config=TEXT, vision_config=IMAGE)
    model = transformers.BlipForConditionalGeneration(config).eval()
    with pytest.raises(ps.SurgeryError, match=r"PSG201: (.|\n)*called with pixel_values; give"):
        ps.capture(model)
