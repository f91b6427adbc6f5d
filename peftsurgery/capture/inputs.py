"""Example inputs of a transformers model, made from its config and the arguments of its forward.

Only names, dtypes and sizes matter: a capture keeps sizes symbolic and never sees a value. Names
are those that transformers gives to each kind of input in every model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedModel

from peftsurgery.errors import SurgeryError

BATCH, LENGTH = 2, 8


def example_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Inputs by name, on the model's device; PSG202 if its main input is of no kind known here."""
    accepted = inspect.signature(model.forward).parameters
    main = model.main_input_name
    if main not in _MAKERS:
        message = f"no example can be made of '{main}', the main input of {type(model).__name__}"
        raise SurgeryError("PSG202", message, "give some: capture(model, inputs={...})")
    wanted = [main]
    if main == "input_ids":
        wanted.append("attention_mask")
    if model.config.is_encoder_decoder and main in ("input_ids", "input_features"):
        wanted.append("decoder_input_ids")
    if _is_dual(model):
        wanted += ["input_ids", "attention_mask", "pixel_values"]
    device = model.device
    return {
        name: _MAKERS[name](model).to(device)
        for name in dict.fromkeys(wanted)
        if name in accepted and name in _MAKERS
    }


def _is_dual(model: PreTrainedModel) -> bool:
    """Whether a text and an image go in side by side, and not as one sequence that is gone on."""
    towers = ("text_config", "vision_config")
    return not model.can_generate() and all(hasattr(model.config, name) for name in towers)


def _ids(model: PreTrainedModel) -> torch.Tensor:
    return torch.ones(BATCH, LENGTH, dtype=torch.long)


def _pixels(model: PreTrainedModel) -> torch.Tensor:
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
    channels = getattr(config, "num_channels", 3)
    return torch.zeros(BATCH, channels, height, width, dtype=model.dtype)


def _features(model: PreTrainedModel) -> torch.Tensor:
    config = model.config
    frames = 2 * getattr(config, "max_source_positions", 64)
    return torch.zeros(BATCH, getattr(config, "num_mel_bins", 80), frames, dtype=model.dtype)


def _waveform(model: PreTrainedModel) -> torch.Tensor:
    return torch.zeros(BATCH, 16_000, dtype=model.dtype)


_MAKERS: Mapping[str, Callable[[PreTrainedModel], torch.Tensor]] = {
    "input_ids": _ids,
    "attention_mask": _ids,
    "decoder_input_ids": _ids,
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": _waveform,
}
