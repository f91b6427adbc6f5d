"""What diffusers makes of names of Stable Diffusion's own code, in UNets of several shapes.

``unet_names.py MODULES.json`` writes the convolutions and linears of each shape's UNet;
``unet_names.py MODULES.json NAMES.json FOUND.json`` reads what each of them is called there, and
writes where the converters of diffusers put it: of a checkpoint, and of a LoRA's names. None where
the latter is not known to mean anything. For an environment with diffusers.
"""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import lora_conversion_utils as loras
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
TIMES: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 40,
    "use_linear_projection": True,
}
# For each shape: which resolutions have attention, the transformers in each, and more.
SHAPES: dict[str, tuple[tuple[int, ...], Any, dict[str, Any]]] = {
    "sd": ((1, 1, 1, 0), 1, {}),
    "sd, one resnet": ((1, 1, 1, 0), 1, {"layers_per_block": 1}),
    "sd, no middle": ((1, 1, 1, 0), 1, {"mid_block_type": None}),
    "sdxl": ((0, 1, 1), (1, 2, 10), TIMES),
    "sdxl, three resnets": ((0, 1, 1), (1, 2, 3), {**TIMES, "layers_per_block": 3}),
    "sdxl, refiner": ((0, 1, 1, 0), 4, TIMES),
    "classes": ((1, 0), 1, {"class_embed_type": "timestep"}),
}


def unet(shape: str) -> UNet2DConditionModel:
    """A UNet of this shape, without values."""
    attends, depths, more = SHAPES[shape]
    with torch.device("meta"):
        return UNet2DConditionModel(
            down_block_types=[DOWN[each] for each in attends],
            up_block_types=[UP[each] for each in reversed(attends)],
            block_out_channels=(8, 16, 32, 32)[: len(attends)],
            transformer_layers_per_block=depths,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
            **more,
        )


def by_checkpoint(names: list[str], config: dict[str, Any]) -> dict[str, str]:
    """Where a checkpoint's tensors go: the module for each name."""
    theirs = {
        f"model.diffusion_model.{name}.{leaf}": name
        for name in names
        for leaf in ("weight", "bias")
    }
    found = convert_ldm_unet_checkpoint(theirs, config)
    return {
        name: key.removesuffix(".weight") for key, name in found.items() if key.endswith(".weight")
    }


def by_lora(name: str, config: dict[str, Any]) -> str | None:
    """Where a LoRA's tensors go; None where the name's conversion fails."""
    joined = "lora_unet_" + name.replace(".", "_")
    tensors = {f"{joined}.lora_{part}.weight": torch.zeros(1) for part in ("down", "up")}
    try:
        tensors = loras._maybe_map_sgm_blocks_to_diffusers(tensors, SimpleNamespace(**config))
        found, _ = loras._convert_non_diffusers_lora_to_diffusers(tensors)
    except (ValueError, IndexError):
        return None
    path = next(iter(found)).removeprefix("unet.").replace(".processor", "")
    return re.sub(r"[._]lora\.down\.weight$|\.down\.weight$", "", path)


if len(sys.argv) == 2:
    linear = (torch.nn.Linear, torch.nn.Conv2d)
    listed = {s: [p for p, m in unet(s).named_modules() if isinstance(m, linear)] for s in SHAPES}
    Path(sys.argv[1]).write_text(json.dumps(listed))
else:
    written: dict[str, Any] = {}
    for shape, names in json.loads(Path(sys.argv[2]).read_text()).items():
        config = dict(unet(shape).config)
        written[shape] = {
            "checkpoint": by_checkpoint(names, config),
            "lora": {name: by_lora(name, config) for name in names},
        }
    Path(sys.argv[3]).write_text(json.dumps(written))
