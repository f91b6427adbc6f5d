"""Names of Stable Diffusion's own code mean the modules of diffusers that it appends in that order.

The oracle is the constructor of its UNet (openaimodel.py), followed in ``unets.py``, and names that
kohya's trainer is known to write.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import peftsurgery as ps
from peftsurgery.formats.foreign.layout import laid_out_otherwise
from peftsurgery.formats.foreign.names import ForeignPart
from tests.formats.foreign.unets import SHAPES, pairs, tree
from tests.formats.test_import_adapter import added, random, same

# As they stand in files for SD 1.x and SDXL.
WRITTEN = {
    "sd": {
        "input_blocks_1_1_proj_in": "down_blocks.0.attentions.0.proj_in",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
        "input_blocks_11_0_emb_layers_1": "down_blocks.3.resnets.1.time_emb_proj",
        "output_blocks_2_1_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
        "output_blocks_11_0_skip_connection": "up_blocks.3.resnets.2.conv_shortcut",
    },
    "sdxl": {
        "input_blocks_0_0": "conv_in",
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
        ),
        "input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
        "middle_block_1_transformer_blocks_0_ff_net_0_proj": (
            "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
        ),
        "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_3_1_proj_in": "up_blocks.1.attentions.0.proj_in",
        "output_blocks_8_0_out_layers_3": "up_blocks.2.resnets.2.conv2",
        "out_2": "conv_out",
        "time_embed_2": "time_embedding.linear_2",
        "label_emb_0_0": "add_embedding.linear_1",
    },
}


def meant(names: list[str], modules: list[str]) -> dict[str, str]:
    """The modules that names of kohya's mean."""
    given = {f"lora_unet_{name}": "lora_unet_" for name in names}
    placed = ForeignPart(given, tuple(modules)).placed()
    return {name.removeprefix("lora_unet_"): path for name, path in placed.items()}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_module_is_found_by_both_of_its_names(shape: str) -> None:
    modules = [ours for _, ours in pairs(shape)]
    assert laid_out_otherwise(modules) == {ours: theirs for theirs, ours in pairs(shape)}
    for names in ([theirs for theirs, _ in pairs(shape)], modules):
        joined = [name.replace(".", "_") for name in names]
        assert meant(joined, modules) == dict(zip(joined, modules, strict=True))


@pytest.mark.parametrize("shape", WRITTEN)
def test_the_names_in_files(shape: str) -> None:
    modules = [ours for _, ours in pairs(shape)]
    assert meant(list(WRITTEN[shape]), modules) == WRITTEN[shape]


def test_one_file_may_have_both_layouts_and_a_module_twice_is_refused() -> None:
    modules = [ours for _, ours in pairs("sdxl")]
    found = meant(["input_blocks_4_1_proj_in", "down_blocks_1_attentions_1_proj_in"], modules)
    assert list(found.values()) == [f"down_blocks.1.attentions.{n}.proj_in" for n in (0, 1)]
    with pytest.raises(ps.SurgeryError, match=r"PSG507: .* both mean 'down_blocks.1.attentions.0"):
        meant(["input_blocks_4_1_proj_in", "down_blocks_1_attentions_0_proj_in"], modules)


@pytest.mark.parametrize(
    "name",
    ["input_blocks_9_0_in_layers_2", "input_blocks_1_1_proj_in", "out_0", "middle_block_1_conv1"],
)
def test_a_name_of_no_module_is_refused(name: str) -> None:
    with pytest.raises(ps.SurgeryError, match=f"PSG506: 'lora_unet_{name}' means no linear"):
        meant([name], [ours for _, ours in pairs("sdxl")])


def test_a_name_of_two_modules_is_refused() -> None:
    both = ["add_embedding.linear_1", "class_embedding.linear_1"]
    with pytest.raises(ps.SurgeryError, match=f"PSG506: .* means both {both[0]} and {both[1]}"):
        meant(["label_emb_0_0"], both)


def test_a_module_that_is_called_like_another_keeps_its_name() -> None:
    modules = ["input_blocks.1.0.in_layers.2", "down_blocks.0.resnets.0.conv1"]
    found = meant(["input_blocks_1_0_in_layers_2", "down_blocks_0_resnets_0_conv1"], modules)
    assert list(found.values()) == modules


def test_only_a_unet_has_the_other_layout() -> None:
    paths = ["encoder.down_blocks.0.resnets.0.conv1", "down_blocks.x.resnets.0.conv1", "down.conv"]
    assert laid_out_otherwise([*paths, "down_blocks.0", "mid_block.0.resnets.0.conv1"]) == {}


def unet() -> Any:
    torch.manual_seed(0)
    return tree(ours for _, ours in pairs("shallow")), {}


@pytest.mark.parametrize("joined", [True, False])
def test_what_is_imported_changes_the_weights_that_are_meant(joined: bool, tmp_path: Path) -> None:
    tensors, expected = {}, {}
    for seed, (theirs, ours) in enumerate(pairs("shallow"), 1):
        taps = (3, 3) if "conv" in ours.split(".")[-1] else ()
        down = random(2, 4, *taps) * seed
        up = random(6, 2, *([1] * len(taps)))
        name = f"lora_unet_{theirs.replace('.', '_')}" if joined else f"unet.{theirs}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = np.array(1, np.float32)
        change = up.reshape(6, 2).astype(float) @ down.reshape(2, -1)
        expected[f"{ours}.weight"] = 0.5 * change.reshape(6, 4, *taps)
    save_file(tensors, tmp_path / "lora.safetensors")
    factory = f"{__name__}:unet"
    ps.import_adapter(tmp_path / "lora.safetensors", tmp_path / "out", factory)
    found = added(unet()[0], tmp_path / "out")
    assert found.keys() == expected.keys()
    same(
        {n: v / np.abs(v).max() for n, v in found.items()},
        {n: v / np.abs(v).max() for n, v in expected.items()},
    )
