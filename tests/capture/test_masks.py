"""Padded batches and batches without padding are the original's, however it decides on masks."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.capture import capture
from tests.capture.pairs import Pair, assert_same, pair
from tests.models.zoo import ZOO, hf, ids

TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}
IMAGE = 98  # the token that stands for a part of an image


@cache
def _paligemma() -> Pair:
    torch.manual_seed(0)
    module = hf(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        text_config={"model_type": "gemma", **TEXT},
        vision_config={"model_type": "siglip_vision_model", **VISION},
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        projection_dim=32,
    )().eval()
    module.config.text_config.use_cache = False
    return Pair(module, capture(module, _text_and_image(2, 9, 0)))


def _text_and_image(batch: int, seq: int, padding: int) -> dict[str, Tensor]:
    tokens = ids(batch, seq) % 90 + 5
    tokens[:, :4] = IMAGE
    mask = torch.ones_like(tokens)
    if padding:
        mask[0, -padding:] = 0
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "pixel_values": torch.randn(batch, 3, 32, 32),
    }


@pytest.mark.slow
def test_a_mask_that_is_left_out_if_it_masks_nothing_is_decided_at_every_call() -> None:
    both = _paligemma()
    for batch, seq, padding in ((3, 11, 0), (3, 11, 2), (2, 8, 0), (2, 12, 3)):
        given = _text_and_image(batch, seq, padding)
        expected, actual = both.run(**given, use_cache=False)
        assert torch.equal(expected.logits, actual.logits), padding
    del given["attention_mask"]
    expected, actual = both.run(**given, use_cache=False)
    assert torch.equal(expected.logits, actual.logits)


def test_a_prefix_that_sees_itself_is_the_originals_with_padding_and_without() -> None:
    both = _paligemma()
    for padding in (0, 2):
        given = _text_and_image(3, 10, padding)
        types = (torch.arange(10) >= 6).long().expand(3, 10).contiguous()
        expected, actual = both.run(**given, token_type_ids=types, use_cache=False)
        assert torch.allclose(expected.logits, actual.logits, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "bert", "gemma3"])
def test_a_mask_that_makes_no_difference_makes_no_capture(name: str) -> None:
    both = pair(name)
    for padding in (0, 2):
        given = ZOO[name].inputs(3, 9)
        given["attention_mask"][0, :padding] = 0
        assert_same(*both.run(**given))
    assert len(both.graph.captures) == 1


@pytest.mark.slow
def test_masks_made_axis_by_axis_leave_no_tensor_of_a_transform_behind() -> None:
    torch.manual_seed(0)
    text = {**TEXT, "sliding_window": 8}
    encoder = {"text_config": text, "vision_config": VISION, "mm_tokens_per_image": 4}
    module = hf(
        "T5Gemma2ForConditionalGeneration",
        "T5Gemma2Config",
        encoder={**encoder, "vocab_size": 99, "image_token_index": IMAGE},
        decoder=text,
        image_token_index=IMAGE,
    )().eval()
    given = {"input_ids": ids(2, 12), "decoder_input_ids": ids(2, 12)}
    mask = torch.ones(2, 12, dtype=torch.long)
    both = Pair(module, capture(module, {**given, "attention_mask": mask}))
    for padding in (0, 3):
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[0, :padding] = 0
        expected, actual = both.run(**given, attention_mask=mask, use_cache=False)
        assert torch.allclose(expected.logits, actual.logits, atol=1e-6)


class Mapped(nn.Module):
    """Uses torch.vmap by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: row * row.sum())(self.into(x))


def test_a_transform_within_a_model_is_refused() -> None:
    with pytest.raises(ps.SurgeryError) as caught:
        capture(Mapped(), {"x": torch.randn(2, 4)})
    assert caught.value.code == "PSG201"
    assert "vmap" in str(caught.value)


class Precise(nn.Module):
    """A part of it runs in lower precision, and may fail there."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(4, 4)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.into(x)
            with torch.autocast("cpu", enabled=False):
                y = y.float().index_select(0, index)
        return y * 2


def test_an_error_within_a_region_of_autocast_leaves_the_region() -> None:
    module = Precise()
    x, index = torch.randn(3, 4), torch.tensor([0, 2])
    both = Pair(module, capture(module, {"x": x, "index": index}))
    for model in (both.original, both.graph):
        with pytest.raises(IndexError):
            model(x, torch.tensor([0, 7]))
        assert not torch.is_autocast_enabled("cpu")
    assert_same(*both.run(x, index))
    assert not torch.is_autocast_enabled("cpu")
