"""Inputs that a model of transformers makes of other inputs' values, made before it is called.

A model that takes images of any sizes in one row of patches asks their sizes (``image_grid_thw``)
for numbers: where each image ends, where its patches and the text's tokens stand. A trace has no
values to ask. transformers lets these be given instead, and has functions that make them; they are
called as the model itself would, so that a capture takes what the model takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.exporters.utils import precompute_export_inputs

from peftsurgery.capture.signature import Call
from peftsurgery.errors import SurgeryError

SIZES = "grid_thw"
MODALITIES = ("image_", "video_", "")  # an encoder by itself has no name for its own


def with_derived(call: Call, module: nn.Module) -> Call:
    """The call with what its model would make of the sizes of its images; as it is without any.

    Images are attended to in one batch while a model is traced, which only those of one size can
    be. PSG201 for others.
    """
    if not isinstance(module, PreTrainedModel) or torch.compiler.is_exporting():
        return call
    found = {modality: call.tensors.get(f"{modality}{SIZES}") for modality in MODALITIES}
    sized = {modality: sizes for modality, sizes in found.items() if sizes is not None}
    whole = _with_made(call, module, sized) if sized else call
    for name, value in whole.tensors.items():
        if name.endswith("seqlens") and not _is_even(value):
            message = f"images, or windows of them, are of unlike sizes in one call ({name})"
            raise SurgeryError("PSG201", message, "give images of one size in a call")
    return whole


def _with_made(call: Call, module: nn.Module, sized: Mapping[str, torch.Tensor]) -> Call:
    """The call with what its model would make of these sizes, by modality."""
    made: dict[str, Any] = {} if call.past else dict(_positions(module, call.tensors))
    encoder = next((m for m in module.modules() if _takes(m.forward, SIZES)), None)
    if encoder is not None:
        for modality, sizes in sized.items():
            read = {SIZES: sizes}
            with torch.no_grad():
                precompute_export_inputs(encoder, read)
            made |= {f"{modality}{name}": v for name, v in read.items() if name != SIZES}
    tensors = {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
    return replace(call, tensors=dict(sorted({**tensors, **call.tensors}.items())))


def _is_even(ends: torch.Tensor) -> bool:
    """Whether sequences that end there are of one length."""
    lengths = ends.diff()
    return ends.is_meta or bool((lengths == lengths[:1]).all())


def _positions(module: nn.Module, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Positions of all tokens, if the model makes them of its inputs' values."""
    if "position_ids" in given or "input_ids" not in given:
        return {}
    for part in module.modules():
        make = getattr(part, "get_rope_index", None)
        if make is not None:
            accepted = inspect.signature(make).parameters
            with torch.no_grad():
                found, _ = make(**{name: given[name] for name in accepted if name in given})
            return {"position_ids": found}
    return {}


def _takes(forward: Any, name: str) -> bool:
    return name in inspect.signature(forward).parameters
