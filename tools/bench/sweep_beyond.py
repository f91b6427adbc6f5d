"""The sweep's models that are none of transformers': small, with random weights, and their inputs.

Each is named ``library:class``. A library that is not installed makes its models unfit, which the
sweep says; nothing but the sweep asks for these libraries.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Sample:
    """A class by its module and name, how to make one, and its inputs for a batch and a size."""

    module: str
    name: str
    inputs: Callable[[int, int], Inputs]
    settings: Mapping[str, Any]
    sizes: tuple[int, int] = (6, 9)  # what it is captured with, and what it is compared at

    def made(self) -> nn.Module:
        """The model. ImportError without its library."""
        made: nn.Module = getattr(importlib.import_module(self.module), self.name)(**self.settings)
        return made


def fit_sample(name: str) -> tuple[nn.Module, Inputs, Inputs]:
    """A model in eval mode, its parameters moved off zero and one; inputs to capture it, others."""
    sample = SAMPLES[name]
    torch.manual_seed(0)
    model = sample.made().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model, sample.inputs(2, sample.sizes[0]), sample.inputs(3, sample.sizes[1])


def _rows(*names: str, width: int = 16) -> Callable[[int, int], Inputs]:
    """Sequences by name, each longer than the one before."""

    def make(batch: int, size: int) -> Inputs:
        return {name: torch.randn(batch, size + i, width) for i, name in enumerate(names)}

    return make


def _images(batch: int, size: int) -> Inputs:
    return {"x": torch.randn(batch, 3, size, size)}


def _attended(batch: int, size: int) -> Inputs:
    keys, values = torch.randn(batch, size + 2, 12), torch.randn(batch, size + 2, 20)
    return {"query": torch.randn(batch, size, 16), "key": keys, "value": values}


def _latents(batch: int, size: int) -> Inputs:
    return {
        "sample": torch.randn(batch, 4, size, size),
        "timestep": torch.arange(batch) + 3,
        "encoder_hidden_states": torch.randn(batch, size - 1, 24),
    }


def _labelled(batch: int, size: int) -> Inputs:
    states = torch.randn(batch, 4, size, size)
    of_batch = torch.arange(batch)
    return {"hidden_states": states, "timestep": of_batch + 3, "class_labels": of_batch + 1}


def _told(batch: int, size: int) -> Inputs:
    return {
        "encoder_hidden_states": torch.randn(batch, size - 1, 24),
        "pooled_projections": torch.randn(batch, 16),
        "timestep": torch.rand(batch),
    }


def _latents_and_text(batch: int, size: int) -> Inputs:
    return {"hidden_states": torch.randn(batch, 4, size, size), **_told(batch, size)}


def _packed_and_text(batch: int, size: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, size * size, 16),
        **_told(batch, size),
        "img_ids": torch.randn(size * size, 3),
        "txt_ids": torch.randn(size - 1, 3),
        "guidance": torch.rand(batch),
    }


def _image_and_text(batch: int, size: int) -> Inputs:
    text = torch.randint(1, 99, (batch, 12))
    return {"image": torch.randn(batch, 3, size, size), "text": text}


def _timm(name: str, sizes: tuple[int, int], **settings: Any) -> Sample:
    made = {"model_name": name, "pretrained": False, "num_classes": 7, **settings}
    return Sample("timm", "create_model", _images, made, sizes)


def _encoder(**settings: Any) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, **settings), 2)


def _decoder(**settings: Any) -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, **settings), 2)


def _of_text(**settings: Any) -> nn.Module:
    found: Any = importlib.import_module("open_clip.model")
    vision = found.CLIPVisionCfg(layers=2, width=32, head_width=8, patch_size=4, image_size=16)
    text = found.CLIPTextCfg(context_length=12, vocab_size=99, width=32, heads=4, layers=2)
    made: nn.Module = found.CLIP(16, vision, text, **settings)
    return made


def _resnet(**settings: Any) -> nn.Module:
    found: Any = importlib.import_module("torchvision.models.resnet")
    made: nn.Module = found.ResNet(found.BasicBlock, [1, 1, 1, 1], **settings)
    return made


def _swin_v2(**settings: Any) -> nn.Module:
    found: Any = importlib.import_module("torchvision.models.swin_transformer")
    parts = {"block": found.SwinTransformerBlockV2, "downsample_layer": found.PatchMergingV2}
    made: nn.Module = found.SwinTransformer(**parts, **settings)
    return made


_SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_projection_dim": 32,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 16,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}
_FLUX = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": (4, 6, 6),
    "joint_attention_dim": 24,
    "pooled_projection_dim": 16,
    "guidance_embeds": True,
}
_UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "norm_num_groups": 4,
    "num_embeds_ada_norm": 10,
}
_VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
_SWIN = {"embed_dim": 16, "window_size": 4, "depths": (2, 2), "num_heads": (2, 4)}
_WINDOWS = {
    "patch_size": [4, 4],
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": [4, 4],
    "num_classes": 7,
}
_PLAIN_VIT = {
    "image_size": 16,
    "patch_size": 4,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "mlp_dim": 32,
    "num_classes": 7,
}
_ROWS_FIRST = {"batch_first": True}

SAMPLES: Mapping[str, Sample] = {
    "diffusers:UNet2DConditionModel": Sample(
        "diffusers", "UNet2DConditionModel", _latents, _UNET, (8, 16)
    ),
    "diffusers:DiTTransformer2DModel": Sample(
        "diffusers", "DiTTransformer2DModel", _labelled, _DIT, (8, 8)
    ),
    "diffusers:SD3Transformer2DModel": Sample(
        "diffusers", "SD3Transformer2DModel", _latents_and_text, _SD3, (8, 16)
    ),
    "diffusers:FluxTransformer2DModel": Sample(
        "diffusers", "FluxTransformer2DModel", _packed_and_text, _FLUX, (4, 5)
    ),
    "timm:vit": _timm("vit_tiny_patch16_224", (16, 24), dynamic_img_size=True, **_VIT),
    "timm:swin": _timm("swin_tiny_patch4_window7_224", (32, 32), img_size=32, **_SWIN),
    "timm:maxvit": _timm(
        "maxvit_tiny_tf_224", (64, 64), img_size=64, embed_dim=(32, 64), depths=(1, 1)
    ),
    "timm:davit": _timm(
        "davit_tiny", (56, 84), embed_dims=(16, 32), depths=(1, 1), num_heads=(2, 4)
    ),
    "timm:convnext": _timm(
        "convnext_atto", (32, 64), dims=(8, 16, 16, 32), depths=(1, 1, 1, 1), conv_mlp=False
    ),
    "torchvision:VisionTransformer": Sample(
        "torchvision.models.vision_transformer", "VisionTransformer", _images, _PLAIN_VIT, (16, 16)
    ),
    "torchvision:SwinTransformer": Sample(
        "torchvision.models.swin_transformer", "SwinTransformer", _images, _WINDOWS, (32, 48)
    ),
    "torchvision:SwinTransformerV2": Sample(__name__, "_swin_v2", _images, _WINDOWS, (32, 48)),
    "torchvision:ResNet": Sample(__name__, "_resnet", _images, {"num_classes": 7}, (32, 48)),
    "open_clip:CLIP": Sample(__name__, "_of_text", _image_and_text, {}, (16, 16)),
    "torch:Transformer": Sample(
        "torch.nn",
        "Transformer",
        _rows("src", "tgt"),
        {
            "d_model": 16,
            "nhead": 2,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "dim_feedforward": 32,
            "batch_first": True,
        },
    ),
    "torch:TransformerEncoder": Sample(
        __name__, "_encoder", _rows("src"), {**_ROWS_FIRST, "norm_first": True}
    ),
    "torch:TransformerDecoder": Sample(__name__, "_decoder", _rows("tgt", "memory"), _ROWS_FIRST),
    "torch:MultiheadAttention": Sample(
        "torch.nn",
        "MultiheadAttention",
        _attended,
        {"embed_dim": 16, "num_heads": 2, "kdim": 12, "vdim": 20, "batch_first": True},
    ),
}
