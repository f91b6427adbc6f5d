"""LoRAs of other programs, spelled by hand as those write them; peft adds what was imported.

The oracle of each weight's change is `scale * up @ down`, of the numbers that were written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, GPT2Config, GPT2LMHeadModel

import peftsurgery as ps
from tests.checkpoint.loras import llama

Q, UP, TABLE = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.embed_tokens"


def text_encoder() -> CLIPTextModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=40, num_hidden_layers=1)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=32, bos_token_id=1, eos_token_id=2))


class Image(nn.Module):
    """A convolution, one of a single tap, and a linear, in blocks like an image model's."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1)])
        self.proj_in = nn.Conv2d(8, 8, 1)
        self.to_q = nn.Linear(8, 6)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        hidden = self.proj_in(self.down_blocks[0](sample))
        out: torch.Tensor = self.to_q(hidden.flatten(2).mT)
        return out


def image() -> Any:
    torch.manual_seed(0)
    return Image().eval(), {"sample": torch.zeros(2, 3, 8, 8)}


def random(*shape: int) -> Any:
    count = int(np.prod(shape))
    return np.random.default_rng(count).normal(size=shape).astype(np.float32)


def added(module: nn.Module, folder: Path) -> dict[str, Any]:
    """What peft adds to the weights of a module by an adapter."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    after = PeftModel.from_pretrained(module, folder).merge_and_unload().state_dict()
    moves = {name: (after[name] - value).double().numpy() for name, value in before.items()}
    return {name: move for name, move in moves.items() if np.abs(move).max() > 0}


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() < 1e-5, name


def test_what_mlx_lm_wrote(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    weight = dict(llama().named_modules())
    tensors, expected = {}, {}
    for path in (Q, UP):
        out, into = weight[path].weight.shape
        a, b = random(into, 3), random(3, out)
        tensors |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
        expected[f"{path}.weight"] = 0.5 * (a.astype(float) @ b).T
    vocabulary, width = weight[TABLE].weight.shape
    a, b = random(vocabulary, 2), random(2, width)
    tensors |= {f"{TABLE}.lora_a": a, f"{TABLE}.lora_b": b}
    expected[f"{TABLE}.weight"] = 0.5 * (a.astype(float) @ b)
    (tmp_path / "mlx").mkdir()
    save_file(tensors, tmp_path / "mlx" / "adapters.safetensors")
    save_file(tensors, tmp_path / "mlx" / "0000100_adapters.safetensors")
    said = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 3, "scale": 0.5}}
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(said))
    report = ps.import_adapter(tmp_path / "mlx", tmp_path / "out", tmp_path / "base")
    assert report.ranks == {Q: 3, UP: 3, TABLE: 2}
    model = llama()
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    same(added(model, tmp_path / "out"), expected)


@pytest.mark.parametrize(
    "beginning", ["lora_te_text_model_", "lora_te1_", "text_encoder.text_model."]
)
def test_a_text_encoder_of_a_pipeline_whatever_its_modules_are_called(
    beginning: str, tmp_path: Path
) -> None:
    text_encoder().save_pretrained(tmp_path / "base")
    path = "encoder.layers.0.self_attn.q_proj"
    module = next(name for name, _ in text_encoder().named_modules() if name.endswith(path))
    down, up = random(4, 16), random(16, 4)
    name = beginning + (path.replace(".", "_") if beginning.endswith("_") else path)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    tensors[f"{name}.alpha"] = np.array(2, np.float32)
    other = "lora_unet_mid_block_attentions_0_proj_in"
    tensors |= {f"{other}.lora_down.weight": down, f"{other}.lora_up.weight": up}
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ps.SurgeryError, match=r"PSG511: .* text_encoder, unet"):
        ps.import_adapter(tmp_path / "lora.safetensors", tmp_path / "out", tmp_path / "base")
    report = ps.import_adapter(
        tmp_path / "lora.safetensors", tmp_path / "out", tmp_path / "base", part="text_encoder"
    )
    assert report.others == {"unet": 2}
    same(
        added(text_encoder(), tmp_path / "out"),
        {f"{module}.weight": 2 / 4 * up.astype(float) @ down},
    )


@pytest.mark.parametrize("joined", [True, False], ids=["kohya", "diffusers"])
def test_an_image_model_with_convolutions(joined: bool, tmp_path: Path) -> None:
    taps = {"down_blocks.0": (8, 3, 3, 3), "proj_in": (8, 8, 1, 1), "to_q": (6, 8)}
    tensors, expected, metadata = {}, {}, {}
    for path, (out, *into) in taps.items():
        down, up = random(2, *into), random(out, 2, *([1] * (len(into) - 1)))
        if path == "proj_in":  # both ways to write a kernel of one tap are met
            down, up = down.reshape(2, 8), up.reshape(8, 2)
        change = up.reshape(out, 2).astype(float) @ down.reshape(2, -1)
        expected[f"{path}.weight"] = 1.5 * change.reshape(out, *into)
        if joined:
            name = f"lora_unet_{path.replace('.', '_')}"
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = np.array([3], np.float32)
        else:
            tensors |= {f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up}
            said = {"unet.r": 2, "unet.lora_alpha": 3.0, "unet.bias": "none", "text_encoder.r": 9}
            metadata = {"lora_adapter_metadata": json.dumps(said)}
    save_file(tensors, tmp_path / "lora.safetensors", metadata or None)
    factory = f"{__name__}:image"
    report = ps.import_adapter(tmp_path / "lora.safetensors", tmp_path / "out", factory)
    assert set(report.ranks.values()) == {2}
    same(added(image()[0], tmp_path / "out"), expected)


def test_weights_that_lie_turned_and_no_scale(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "base")
    path, down, up = "transformer.h.0.attn.c_attn", random(2, 16), random(48, 2)
    tensors = {f"{path}.lora.down.weight": down, f"{path}.lora.up.weight": up}
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    ps.import_adapter(tmp_path / "lora", tmp_path / "out", tmp_path / "base")
    same(added(gpt2(), tmp_path / "out"), {f"{path}.weight": (up.astype(float) @ down).T})


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no such spelling": ({f"{Q}.weight": random(2, 2)}, "PSG523: .* has 'model.layers.0"),
    "nothing": ({}, "PSG523: .* holds no tensors"),
    "more": ({f"{Q}.dora_scale": random(2, 2)}, "PSG520: .* it has '.*dora_scale'"),
    "typo": (
        {"model.layers.0.self_attn.q_porj.lora_a": random(2, 2)},
        "PSG506: 'model.layers.0.self_attn.q_porj' means no linear",
    ),
    "half": ({f"{UP}.lora_a": random(16, 2)}, f"PSG507: '{UP}' has no 'lora_b'"),
    "ranks": (
        {f"{UP}.lora_a": random(16, 2), f"{UP}.lora_b": random(3, 24)},
        "PSG507: the factors of .* do not fit",
    ),
    "sizes": (
        {f"{UP}.lora_a": random(15, 2), f"{UP}.lora_b": random(2, 24)},
        "PSG507: the factors of .* and its weight is",
    ),
    "integers": (
        {f"{UP}.lora_a": np.ones((16, 2), np.int8), f"{UP}.lora_b": random(2, 24)},
        "PSG505: .* holds I8, which is no float",
    ),
    "not finite": (
        {f"{UP}.lora_a": np.full((16, 2), np.nan, np.float32), f"{UP}.lora_b": random(2, 24)},
        "PSG505: .* holds NaN or infinity",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_is_refused_and_nothing_is_written(kind: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    tensors, message = BROKEN[kind]
    good = {f"{Q}.lora_a": random(16, 2), f"{Q}.lora_b": random(2, 16)} if tensors else {}
    spelled = {} if kind == "no such spelling" else good
    save_file({**spelled, **tensors}, tmp_path / "adapters.safetensors")
    with pytest.raises(ps.SurgeryError, match=message):
        ps.import_adapter(tmp_path / "adapters.safetensors", tmp_path / "out", tmp_path / "base")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"fine_tune_type": "dora", "lora_parameters": {"scale": 1.0}}, "PSG520: .* is 'dora'"),
        ({"fine_tune_type": "lora", "lora_parameters": {}}, "PSG503: .* scale cannot be None"),
        ({"fine_tune_type": "lora", "lora_parameters": 3}, "PSG503: .* scale cannot be None"),
    ],
)
def test_a_config_that_says_more_or_nothing_is_refused(
    said: dict[str, Any], message: str, tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path / "base")
    (tmp_path / "mlx").mkdir()
    tensors = {f"{Q}.lora_a": random(16, 2), f"{Q}.lora_b": random(2, 16)}
    save_file(tensors, tmp_path / "mlx" / "adapters.safetensors")
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(ps.SurgeryError, match=message):
        ps.import_adapter(tmp_path / "mlx", tmp_path / "out", tmp_path / "base")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "PSG503: .* lora_adapter_metadata"),
        ('{"unet.r": 5, "unet.lora_alpha": 1}', "PSG507: .* rank 2, and the metadata of .* say 5"),
        ('{"unet.r": 2, "unet.lora_alpha": "x"}', "PSG503: alpha|PSG503: .*alpha of"),
        (
            '{"unet.r": 2, "unet.lora_alpha": 1, "unet.use_dora": true}',
            "PSG520: .* use_dora is True",
        ),
    ],
)
def test_metadata_that_contradict_are_refused(metadata: str, message: str, tmp_path: Path) -> None:
    tensors = {"unet.to_q.lora_A.weight": random(2, 8), "unet.to_q.lora_B.weight": random(6, 2)}
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": metadata})
    with pytest.raises(ps.SurgeryError, match=message):
        ps.import_adapter(file, tmp_path / "out", f"{__name__}:image")


def test_names_that_mean_two_modules_are_refused(tmp_path: Path) -> None:
    tensors = {}
    for name in ("lora_unet_to_q", "unet.to_q"):
        tensors |= {
            f"{name}.lora_down.weight": random(2, 8),
            f"{name}.lora_up.weight": random(6, 2),
        }
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ps.SurgeryError, match=r"PSG507: .* both mean 'to_q'"):
        ps.import_adapter(tmp_path / "lora.safetensors", tmp_path / "out", f"{__name__}:image")
