"""Models that read the sizes of images are captured once, for images of any sizes.

The oracle is transformers' own model, called with the same inputs; and with the product of the
factors added to its weights.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import peftsurgery as ps
from peftsurgery.errors import SurgeryError

IMAGE, START, END = 5, 7, 8
TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "in_channels": 3,
}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 6,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def qwen2_vl() -> nn.Module:
    vision = {**VISION, "embed_dim": 32, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=TEXT, vision_config=vision, **TOKENS)
    )


def qwen2_5_vl() -> nn.Module:
    windows = {"window_size": 16, "fullatt_block_indexes": [1]}
    vision = {**VISION, "out_hidden_size": 32, "intermediate_size": 48, **windows}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=TEXT, vision_config=vision, **TOKENS)
    )


def batch(*sizes: tuple[int, int]) -> dict[str, Tensor]:
    """One text with images of these heights and widths, in patches."""
    torch.manual_seed(len(sizes))
    pieces = [torch.randint(10, 99, (3,))]
    for height, width in sizes:
        image = torch.full((height * width // 4,), IMAGE)
        pieces += [torch.tensor([START]), image, torch.tensor([END]), torch.randint(10, 99, (2,))]
    ids = torch.cat(pieces)[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(sum(h * w for h, w in sizes), 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, height, width] for height, width in sizes]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("build", [qwen2_vl, qwen2_5_vl])
def test_one_capture_serves_images_of_any_sizes(build: Any) -> None:
    torch.manual_seed(0)
    model: Any = build().eval()
    model.config.use_cache = False
    graph = ps.capture(model, inputs=batch((4, 8)))
    for size in ((4, 8), (8, 4), (8, 12), (4, 4)):
        given = batch(size)
        with torch.no_grad():
            assert torch.equal(graph(**given).logits, model(**given).logits)
    assert len(graph.captures) == 1
    for sizes in (((4, 8), (4, 8)), ((8, 8), (8, 8), (8, 8))):  # they are attended to in a batch
        given = batch(*sizes)
        with torch.no_grad():
            expected = model(**given).logits
            torch.testing.assert_close(graph(**given).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_images_of_unlike_sizes_in_one_call_are_refused() -> None:
    model: Any = qwen2_vl().eval()
    with pytest.raises(SurgeryError, match=r"PSG201.*unlike sizes.*image_cu_seqlens"):
        ps.capture(model, inputs=batch((4, 8), (4, 4)))
    graph = ps.capture(model, inputs=batch((4, 8)))
    with pytest.raises(SurgeryError, match=r"PSG201.*unlike sizes"):
        graph(**batch((8, 8), (4, 8)))


def test_an_encoder_of_images_by_itself_is_held_to_one_size_in_a_call() -> None:
    torch.manual_seed(0)
    model: Any = qwen2_vl().eval()
    encoder = model.model.visual

    def patches(*sizes: tuple[int, int]) -> dict[str, Tensor]:
        rows = torch.randn(sum(h * w for h, w in sizes), 3 * 2 * 4 * 4)
        return {"hidden_states": rows, "grid_thw": torch.tensor([[1, h, w] for h, w in sizes])}

    graph = ps.capture(encoder, inputs=patches((4, 8), (4, 8)))
    for sizes in (((4, 8), (4, 8)), ((8, 4), (8, 4))):
        given = patches(*sizes)
        with torch.no_grad():
            expected = encoder(**given).pooler_output
            torch.testing.assert_close(graph(**given).pooler_output, expected, rtol=0, atol=1e-6)
    with pytest.raises(SurgeryError, match=r"PSG201.*unlike sizes.*\(cu_seqlens\)"):
        graph(**patches((4, 4), (4, 12)))
    ends = {"cu_seqlens": torch.tensor([0, 16, 64], dtype=torch.int32)}
    with pytest.raises(SurgeryError, match=r"PSG201.*unlike sizes"):
        ps.capture(encoder, inputs={**patches((4, 4), (4, 12)), **ends})


@pytest.mark.slow
def test_both_towers_are_adapted_and_folded() -> None:
    torch.manual_seed(0)
    model: Any = qwen2_vl().eval()
    model.config.use_cache = False
    graph = ps.capture(model, inputs=batch((4, 8)))
    operated = ps.apply(graph, "lora_qv", rank=2)
    assert len(operated.report.matches) == 8
    seen = ps.apply(graph, "lora_qv", where={"tower": ["vision"]}).report.matches
    assert {match["module"].split(".")[1] for match in seen} == {"visual"}
    for name in operated.report.added:
        nn.init.normal_(operated.get_parameter(name), std=0.1)
    given = batch((8, 4))
    with torch.no_grad():
        changed = operated(**given).logits
        assert not torch.allclose(changed, model(**given).logits)
        torch.testing.assert_close(ps.fold(operated)(**given).logits, changed, rtol=0, atol=1e-5)
