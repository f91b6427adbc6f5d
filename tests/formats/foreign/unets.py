"""UNets as diffusers lays them out, and the names of Stable Diffusion's own code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ATTENTION = ("proj_in", "transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.0.proj")

# openaimodel.py: the resnets of each resolution, and the resolutions with attention; the shapes of
# Stable Diffusion 1 and 2, and of SDXL. Others are made up: resolutions that differ in their
# resnets, a middle without attention.
SHAPES: dict[str, tuple[Sequence[int], Sequence[bool], bool]] = {
    "sd": ((2, 2, 2, 2), (True, True, True, False), True),
    "sdxl": ((2, 2, 2), (False, True, True), True),
    "refiner": ((2, 2, 2, 2), (False, True, True, False), True),
    "shallow": ((1, 1), (True, False), True),
    "uneven": ((3, 1, 2), (False, True, True), False),
}


def pairs(shape: str) -> list[tuple[str, str]]:
    """The modules' names in Stability's code, as its constructor appends them, and in diffusers."""
    resnets, attends, has_middle_attention = SHAPES[shape]
    found = [
        ("input_blocks.0.0", "conv_in"),
        ("out.2", "conv_out"),
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("label_emb.0.0", "add_embedding.linear_1"),
        ("label_emb.0.2", "add_embedding.linear_2"),
    ]
    number = 1
    for level, count in enumerate(resnets):
        for each in range(count):
            found += cell(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{each}", RESNET)
            if attends[level]:
                attention = f"down_blocks.{level}.attentions.{each}"
                found += cell(f"input_blocks.{number}.1", attention)
            number += 1
        if level != len(resnets) - 1:
            found.append(
                (f"input_blocks.{number}.0.op", f"down_blocks.{level}.downsamplers.0.conv")
            )
            number += 1
    found += cell("middle_block.0", "mid_block.resnets.0", RESNET)
    if has_middle_attention:
        found += cell("middle_block.1", "mid_block.attentions.0")
        found += cell("middle_block.2", "mid_block.resnets.1", RESNET)
    number = 0
    for stage, level in enumerate(reversed(range(len(resnets)))):
        for each in range(resnets[level] + 1):
            found += cell(f"output_blocks.{number}.0", f"up_blocks.{stage}.resnets.{each}", RESNET)
            place = 1
            if attends[level]:
                found += cell(f"output_blocks.{number}.1", f"up_blocks.{stage}.attentions.{each}")
                place = 2
            if level and each == resnets[level]:
                sampler = f"up_blocks.{stage}.upsamplers.0.conv"
                found.append((f"output_blocks.{number}.{place}.conv", sampler))
            number += 1
    return found


def cell(theirs: str, ours: str, names: dict[str, str] | None = None) -> list[tuple[str, str]]:
    within = names if names is not None else {name: name for name in ATTENTION}
    return [(f"{theirs}.{one}", f"{ours}.{other}") for one, other in within.items()]


def tree(paths: Iterable[str]) -> nn.Module:
    """Modules at these paths: convolutions where diffusers has them, and linears."""
    root = nn.Module()
    for path in paths:
        *parents, last = path.split(".")
        at = root
        for name in parents:
            if name not in dict(at.named_children()):
                at.add_module(name, nn.Module())
            at = at.get_submodule(name)
        at.add_module(last, nn.Conv2d(4, 6, 3) if "conv" in last else nn.Linear(4, 6))
    return root
