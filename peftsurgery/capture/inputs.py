"""Example inputs of a transformers model, made from its config and the arguments of its forward.

Only names, dtypes and sizes matter: a capture keeps sizes symbolic and never sees a value. Names
are those that transformers gives to each kind of input in every model. Where ids are not one text a
row (several choices of an answer, several streams of codes for one sound), a model's own reference
says what shape they have.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from peftsurgery.errors import SurgeryError

BATCH, LENGTH, FEW = 2, 8, 3
PLAIN = [["batch_size"], ["sequence_length"]]
FRAMES = "audio_length_per_tok"  # of sound that goes in beside a text, for each of its tokens


def example_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Inputs by name, on the model's device; PSG202 if one that is needed is of no kind known here.

    Needed are the main input and what the forward has no default for.
    """
    accepted = inspect.signature(model.forward).parameters
    main = model.main_input_name
    required = [name for name, parameter in accepted.items() if _is_required(parameter)]
    unknown = [name for name in dict.fromkeys((main, *required)) if _maker(name) is None]
    if unknown:
        asked = f"{type(model).__name__}.forward asks for"
        message = f"no example can be made of {' and '.join(unknown)}, which {asked}"
        given = ", ".join(f"'{name}': ..." for name in dict.fromkeys((main, *required)))
        raise SurgeryError("PSG202", message, f"give some: capture(model, inputs={{{given}}})")
    wanted = [main]
    if main == "input_ids":
        wanted.append("attention_mask")
    if hasattr(model.config, FRAMES):
        wanted.append("input_features")
    if model.config.is_encoder_decoder and main in ("input_ids", "input_features"):
        wanted.append("decoder_input_ids")
    if _is_dual(model):
        wanted += ["input_ids", "attention_mask", "pixel_values"]
    if "pixel_values" in wanted and _takes_patches(model):
        wanted += ["pixel_attention_mask", "spatial_shapes"]
    return {
        name: make(model, name).to(model.device)
        for name in dict.fromkeys((*wanted, *required))
        if name in accepted and (make := _maker(name)) is not None
    }


def _is_required(parameter: inspect.Parameter) -> bool:
    is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    return is_named and parameter.default is parameter.empty


def _maker(name: str) -> Callable[[PreTrainedModel, str], torch.Tensor] | None:
    """What makes an input, by its name or the end of it: qformer_input_ids are ids."""
    ends = (made for known, made in _MAKERS.items() if name.endswith(f"_{known}"))
    return _MAKERS.get(name) or next(ends, None)


def _is_dual(model: PreTrainedModel) -> bool:
    """Whether a text and an image go in side by side, and not as one sequence.

    Where the text has ids that images take the place of, the text alone goes through.
    """
    towers, places = ("text_config", "vision_config"), ("image_token_id", "image_token_index")
    config = model.config
    has_places = any(hasattr(config, name) for name in places)
    is_one = model.can_generate() or (has_places and model.main_input_name == "input_ids")
    return not is_one and all(hasattr(config, name) for name in towers)


def _ids(model: PreTrainedModel, name: str) -> torch.Tensor:
    axes = _told_axes(model, name)
    shape = [math.prod(_told_size(model, factor) for factor in axis) for axis in axes]
    return torch.ones(shape, dtype=torch.long)


def _mask(model: PreTrainedModel, name: str) -> torch.Tensor:
    """A mask of ids: one number for each token, however many ids it has."""
    axes = _told_axes(model, model.main_input_name)
    length = next(i for i, axis in enumerate(axes) if _is_length(axis[-1]))
    shape = [_told_size(model, axis[0]) for axis in axes[: length + 1]]
    return torch.ones(shape, dtype=torch.long)


def _told_axes(model: PreTrainedModel, name: str) -> list[list[str]]:
    """The axes of ids, each a product of sizes by their names: (batch_size, sequence_length).

    Others are told by the model's own reference, if all sizes that are multiplied are known.
    """
    pattern = rf"^\s*{name} \(.*?of shape `\(([\w\s,*]+)\)`"
    found = re.search(pattern, inspect.getdoc(model.forward) or "", re.MULTILINE)
    told = found.group(1) if found else ""
    axes = [[factor.strip() for factor in axis.split("*")] for axis in told.split(",")]
    products = [factor for axis in axes if len(axis) > 1 for factor in axis]
    is_more = len(axes) > 2 or bool(products)
    is_known = all(_known_size(model, factor) is not None for factor in products)
    return axes if is_more and is_known and any(_is_length(a[-1]) for a in axes) else PLAIN


def _is_length(name: str) -> bool:
    return name.endswith(("length", "len"))


def _told_size(model: PreTrainedModel, name: str) -> int:
    """A size by its name; a few for what is not known: choices."""
    known = _known_size(model, name)
    return FEW if known is None else known


def _known_size(model: PreTrainedModel, name: str) -> int | None:
    """The length of a text, how many are in a batch, or what a config has by this name."""
    if _is_length(name):
        return LENGTH
    if name.startswith("batch"):
        return BATCH
    decoder = model.config.get_text_config(decoder=True)
    sizes = [getattr(config, name, None) for config in (decoder, model.config)]
    return next((size for size in sizes if isinstance(size, int)), None)


def _vision(model: PreTrainedModel) -> PreTrainedConfig:
    config: PreTrainedConfig = getattr(model.config, "vision_config", model.config)
    return config


def _takes_patches(model: PreTrainedModel) -> bool:
    """Whether images come cut into patches, as many in a row and in a column as is said beside."""
    return "spatial_shapes" in inspect.signature(model.forward).parameters


def _pixels(model: PreTrainedModel, name: str) -> torch.Tensor:
    config = _vision(model)
    channels = getattr(config, "num_channels", 3)
    if _takes_patches(model):
        within = channels * config.patch_size**2
        return torch.zeros(BATCH, config.num_patches, within, dtype=model.dtype)
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
    return torch.zeros(BATCH, channels, height, width, dtype=model.dtype)


def _patch_mask(model: PreTrainedModel, name: str) -> torch.Tensor:
    return torch.ones(BATCH, _vision(model).num_patches, dtype=torch.long)


def _patch_shapes(model: PreTrainedModel, name: str) -> torch.Tensor:
    return torch.full((BATCH, 2), math.isqrt(_vision(model).num_patches))


def _features(model: PreTrainedModel, name: str) -> torch.Tensor:
    config = getattr(model.config, "audio_config", model.config)
    frames = 2 * getattr(config, "max_source_positions", 64)
    frames = LENGTH * getattr(model.config, FRAMES) if hasattr(model.config, FRAMES) else frames
    return torch.zeros(BATCH, getattr(config, "num_mel_bins", 80), frames, dtype=model.dtype)


def _waveform(model: PreTrainedModel, name: str) -> torch.Tensor:
    return torch.zeros(BATCH, 16_000, dtype=model.dtype)


_MAKERS: Mapping[str, Callable[[PreTrainedModel, str], torch.Tensor]] = {
    "input_ids": _ids,
    "attention_mask": _mask,
    "decoder_input_ids": _ids,
    "pixel_values": _pixels,
    "pixel_attention_mask": _patch_mask,
    "spatial_shapes": _patch_shapes,
    "input_features": _features,
    "input_values": _waveform,
}
