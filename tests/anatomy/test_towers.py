"""Which weights read text, images or sound, and which are between, by tables written by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import peftsurgery as ps
from peftsurgery.anatomy import survey
from peftsurgery.language.selection import NUMBER

WIDTH, IMAGE = 16, 30
WEIGHTS = ("linear", "conv", "embedding")


class Layer(nn.Module):
    """Attention, to a memory too if there is one, and a feed-forward."""

    def __init__(self, crosses: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.up, self.down = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 32),
            nn.Linear(32, WIDTH),
        )
        if crosses:
            self.query, self.memory = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        if memory is not None:
            k, v = self.memory(memory).unflatten(-1, (2, 2, 8)).permute(2, 0, 3, 1, 4)
            q = self.query(x).unflatten(-1, (2, 8)).transpose(1, 2)
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y: Tensor = x + self.down(F.gelu(self.up(x)))
        return y


def layers(crosses: bool = False) -> nn.ModuleList:
    return nn.ModuleList(Layer(crosses) for _ in range(2))


class Scattered(nn.Module):
    """Patches of an image, projected, take the places of some tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.places = nn.Conv2d(3, WIDTH, 4, 4), nn.Embedding(4, WIDTH)
        self.seeing, self.first, self.second = layers(), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.after = nn.LayerNorm(WIDTH)
        self.words, self.speaking, self.head = (
            nn.Embedding(40, WIDTH),
            layers(),
            nn.Linear(WIDTH, 40),
        )

    def forward(self, ids: Tensor, picture: Tensor) -> Tensor:
        seen = self.patch(picture).flatten(2).transpose(1, 2) + self.places(torch.arange(4))
        for layer in self.seeing:
            seen = layer(seen)
        seen = self.second(F.gelu(self.first(self.after(seen))))
        x = self.words(ids).masked_scatter((ids == IMAGE)[..., None], seen)
        for layer in self.speaking:
            x = layer(x)
        y: Tensor = self.head(x)
        return y


class Merged(Scattered):
    """Patches of a video, four of which are merged to one; features of each layer are added."""

    def __init__(self) -> None:
        super().__init__()
        del self.patch, self.places
        self.volume = nn.Conv3d(3, WIDTH, (2, 4, 4), (2, 4, 4), bias=False)
        self.first, self.deep = (
            nn.Linear(4 * WIDTH, 24),
            nn.ModuleList(nn.Linear(4 * WIDTH, WIDTH) for _ in range(2)),
        )

    def forward(self, ids: Tensor, patches: Tensor) -> Tensor:
        seen = self.volume(patches.view(-1, 3, 2, 4, 4)).view(len(ids), -1, WIDTH)
        added: Any = 0
        for layer, merge in zip(self.seeing, self.deep, strict=True):
            seen = layer(seen)
            added = added + merge(seen.reshape(len(ids), -1, 4 * WIDTH))
        merged = self.after(seen).reshape(len(ids), -1, 4 * WIDTH)
        seen = self.second(F.gelu(self.first(merged))) + added
        x = self.words(ids).masked_scatter((ids == IMAGE)[..., None], seen)
        for layer in self.speaking:
            x = layer(x)
        y: Tensor = self.head(x)
        return y


class Heard(nn.Module):
    """An encoder of sound, whose result every layer of text looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.wave, self.hearing, self.after = (
            nn.Conv1d(6, WIDTH, 3, 2, 1),
            layers(),
            nn.LayerNorm(WIDTH),
        )
        self.words, self.speaking, self.head = (
            nn.Embedding(40, WIDTH),
            layers(True),
            nn.Linear(WIDTH, 40),
        )

    def forward(self, ids: Tensor, sound: Tensor) -> Tensor:
        heard = F.gelu(self.wave(sound)).transpose(1, 2)
        for layer in self.hearing:
            heard = layer(heard)
        heard, x = self.after(heard), self.words(ids)
        for layer in self.speaking:
            x = layer(x, heard)
        y: Tensor = self.head(x)
        return y


class Compared(nn.Module):
    """Two towers, and how alike their results are."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.seeing, self.seen = (
            nn.Conv2d(3, WIDTH, 4, 4),
            layers(),
            nn.Linear(WIDTH, 8),
        )
        self.words, self.reading, self.read = nn.Embedding(40, WIDTH), layers(), nn.Linear(WIDTH, 8)

    def forward(self, ids: Tensor, picture: Tensor) -> Tensor:
        seen, read = self.patch(picture).flatten(2).transpose(1, 2), self.words(ids)
        for layer in self.seeing:
            seen = layer(seen)
        for layer in self.reading:
            read = layer(read)
        return self.read(read.mean(1)) @ self.seen(seen.mean(1)).T


LAYER = ("qkv", "out", "up", "down")


def stack(name: str, *more: str) -> set[str]:
    return {f"{name}.#.{part}" for part in (*LAYER, *more)}


TOWERS: dict[str, tuple[type[nn.Module], dict[str, set[str]]]] = {
    "scattered": (
        Scattered,
        {
            "vision": {"patch", "places", *stack("seeing")},
            "connector": {"first", "second"},
            "text": {"words", "head", *stack("speaking")},
        },
    ),
    "merged": (
        Merged,
        {
            "vision": {"volume", *stack("seeing")},
            "connector": {"first", "second", "deep.#"},
            "text": {"words", "head", *stack("speaking")},
        },
    ),
    "heard": (
        Heard,
        {
            "audio": {"wave", *stack("hearing")},
            "text": {"words", "head", *stack("speaking", "query", "memory")},
        },
    ),
    "compared": (
        Compared,
        {
            "vision": {"patch", "seen", *stack("seeing")},
            "text": {"words", "read", *stack("reading")},
        },
    ),
}
IDS = torch.arange(2, 14).reshape(2, 6)
IDS[:, 1:5] = IMAGE
INPUTS = {
    "scattered": {"ids": IDS, "picture": torch.randn(2, 3, 8, 8)},
    "merged": {"ids": IDS, "patches": torch.randn(32, 96)},
    "heard": {"ids": IDS, "sound": torch.randn(2, 6, 12)},
    "compared": {"ids": IDS, "picture": torch.randn(2, 3, 8, 8)},
}


@cache
def captured(name: str) -> ps.GraphModel:
    torch.manual_seed(0)
    return ps.capture(TOWERS[name][0]().eval(), INPUTS[name])


def towers(model: ps.GraphModel) -> dict[str, set[str]]:
    """The modules with weights by their tower; # is a layer."""
    found: dict[str, set[str]] = {}
    for site in survey(model.base_capture):
        if site.kind in WEIGHTS:
            module = NUMBER.sub("#", site.module)
            found.setdefault(str(site.facts.get("tower")), set()).add(module)
    return found


@pytest.mark.parametrize("name", TOWERS)
def test_weights_are_in_the_tower_of_what_they_read(name: str) -> None:
    assert towers(captured(name)) == TOWERS[name][1]


@pytest.mark.parametrize("name", TOWERS)
def test_norms_and_biases_are_in_the_tower_of_their_layer(name: str) -> None:
    for site in survey(captured(name).base_capture):
        first = site.module.partition(".")[0]
        if site.kind in ("norm", "attention", "residual", "parameter"):
            expected = [t for t, modules in TOWERS[name][1].items() if f"{first}.#.up" in modules]
            assert not expected or site.facts["tower"] == expected[0]


def test_rules_are_narrowed_to_a_tower_and_reports_count_them() -> None:
    operated = ps.apply(captured("scattered"), "lora_all_linear", where={"tower": "text"})
    modules = {NUMBER.sub("#", match["module"]) for match in operated.report.matches}
    assert modules == stack("speaking")
    shares = operated.report.to_dict()["towers"]
    assert shares["text"] == {"matched": 8, "of": 10}
    assert shares["vision"] == {"matched": 0, "of": 10}
    assert "by tower: " in str(operated.report)
    both = ps.apply(
        captured("scattered"), "lora_all_linear", where={"tower": ["text", "connector"]}
    )
    assert len(both.report.matches) == 10


def test_a_model_of_one_sense_is_one_tower() -> None:
    model = nn.Sequential(nn.Embedding(40, 8), nn.Linear(8, 40))
    graph = ps.capture(model, {"input": IDS})
    assert towers(graph) == {"text": {"0", "1"}}
    image = nn.Sequential(nn.Conv2d(3, 8, 2), nn.Flatten(), nn.Linear(8 * 9, 5))
    assert towers(ps.capture(image, {"input": torch.randn(2, 3, 4, 4)})) == {"vision": {"0", "2"}}


TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 8,
}
SPLIT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
CLIP_LAYER = (*SPLIT, "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
LLAMA_LAYER = (*SPLIT, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PATCHES = ("patch_embedding", "position_embedding")


def under(prefix: str, *names: str) -> set[str]:
    return {f"{prefix}.{name}" for name in names}


def llava(batch: int, tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (batch, tokens))
    ids[:, 1:5] = 98
    picture = torch.randn(batch, 3, 16, 16)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": picture}


def test_llava_is_captured_with_its_images_and_told_apart() -> None:
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**IMAGES, projection_dim=32),
        text_config=transformers.LlamaConfig(**TEXT, use_cache=False),
        image_token_index=98,
        vision_feature_layer=-1,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    graph = ps.capture(model, inputs=llava(2, 9))
    assert towers(graph) == {
        "vision": under("model.vision_tower.encoder.layers.#", *CLIP_LAYER)
        | under("model.vision_tower.embeddings", *PATCHES),
        "connector": under("model.multi_modal_projector", "linear_1", "linear_2"),
        "text": under("model.language_model.layers.#", *LLAMA_LAYER)
        | {"model.language_model.embed_tokens", "lm_head"},
    }
    for batch, tokens in ((3, 12), (4, 7)):
        inputs = llava(batch, tokens)
        with torch.no_grad():
            assert torch.equal(graph(**inputs).logits, model(**inputs).logits)


def test_clip_has_two_towers() -> None:
    config = transformers.CLIPConfig(
        text_config={**TEXT, "max_position_embeddings": 64},
        vision_config=IMAGES,
        projection_dim=16,
    )
    graph = ps.capture(transformers.CLIPModel(config).eval())
    assert towers(graph) == {
        "vision": under("vision_model.encoder.layers.#", *CLIP_LAYER)
        | under("vision_model.embeddings", *PATCHES)
        | {"visual_projection"},
        "text": under("text_model.encoder.layers.#", *CLIP_LAYER)
        | under("text_model.embeddings", "token_embedding", "position_embedding")
        | {"text_projection"},
    }


@pytest.mark.slow
def test_whisper_hears_and_speaks() -> None:
    sizes = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
    config = transformers.WhisperConfig(
        vocab_size=99,
        d_model=32,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=32,
        decoder_start_token_id=1,
        pad_token_id=0,
        **{
            f"{side}_{name}": size
            for side in ("encoder", "decoder")
            for name, size in sizes.items()
        },
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    inputs = {
        "input_features": torch.randn(2, 8, 40),
        "decoder_input_ids": torch.randint(3, 90, (2, 6)),
    }
    own = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
    crossed = (name.replace("self", "encoder") for name in own)
    assert towers(ps.capture(model, inputs)) == {
        "audio": under("model.encoder", "conv1", "conv2", "embed_positions")
        | under("model.encoder.layers.#", *own, "fc1", "fc2"),
        "text": under("model.decoder.layers.#", *own, *crossed, "fc1", "fc2")
        | {"model.decoder.embed_tokens", "proj_out"},
    }
