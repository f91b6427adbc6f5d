"""Folding of four-bit weights: packing again, and the error of what is written.

The new weight is the unpacked one and the update, added in fp32. Written in full precision it is
rounded to the base's dtype; packed again, it moves to the nearest of sixteen numbers in each block.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from peftsurgery.capture.tensors import owner_of
from peftsurgery.errors import SurgeryError
from peftsurgery.surgery.fourbit.pack import PackedWeight, bitsandbytes, pack, unpack


@dataclass(frozen=True)
class FoldError:
    """Absolute error of written weights against exact ones: largest, where, and mean."""

    weights: int
    largest: float
    worst: str | None
    mean: float

    def to_dict(self) -> dict[str, Any]:
        """The error as ``--json`` prints it."""
        return asdict(self)

    def __str__(self) -> str:
        if self.worst is None:
            return "no weight was changed"
        return (
            f"{self.weights} weights were changed; what is written differs from their exact values "
            f"by {self.mean:.1e} on average and at most {self.largest:.1e} ('{self.worst}')"
        )


@dataclass(frozen=True)
class Gap:
    """Absolute differences of a written weight from the exact one: largest, sum and number."""

    largest: float = 0.0
    total: float = 0.0
    count: int = 0


def gap_between(exact: torch.Tensor, written: torch.Tensor, stored: PackedWeight | None) -> Gap:
    """The gap of a ``written`` weight, packed again first if it is ``stored`` in four bits."""
    if stored is not None:
        written = unpack(pack(written, stored.recipe), stored.recipe)
    largest, total = 0.0, 0.0
    for whole, mine in zip(in_blocks(exact), in_blocks(written), strict=True):
        gap = (mine.to(whole.dtype) - whole).abs()
        largest, total = max(largest, float(gap.max())), total + float(gap.sum(dtype=torch.float64))
    return Gap(largest, total, exact.numel())


def in_blocks(weight: torch.Tensor) -> Sequence[torch.Tensor]:
    """A weight in blocks of rows, views of it, of which each needs little memory."""
    return weight.chunk(64) if weight.dim() and weight.numel() > 2**18 else (weight,)


def error_of(gaps: Mapping[str, Gap]) -> FoldError:
    """The error of all written weights, of the gap of each by its name."""
    count = sum(gap.count for gap in gaps.values())
    worst = max(gaps, key=lambda name: gaps[name].largest, default=None)
    largest = gaps[worst].largest if worst is not None else 0.0
    mean = sum(gap.total for gap in gaps.values()) / max(count, 1)
    return FoldError(len(gaps), largest, worst, mean)


def pack_layers(module: nn.Module, stored: Mapping[str, PackedWeight]) -> None:
    """Make the layers of these weights bitsandbytes' own, in place.

    A transformers model says so in its config too, so that ``save_pretrained`` writes what
    ``from_pretrained`` reads back. PSG406 for a weight that no four-bit layer can have, PSG407 if
    there are none.
    """
    if not stored:
        message = "nothing was kept in four bits, so there is nothing to quantise again"
        raise SurgeryError("PSG407", message, "apply nf4 or qlora, or fold in full precision")
    for name, each in stored.items():
        _pack_layer(module, name, each)
    if isinstance(module, PreTrainedModel):
        _declare(module, stored)


def _pack_layer(module: nn.Module, name: str, stored: PackedWeight) -> None:
    old, leaf = owner_of(module, name)
    if not isinstance(old, nn.Linear | Conv1D) or leaf != "weight":
        raise _no_layer(
            f"'{name}' is the weight of a {type(old).__name__}, which has no four-bit form"
        )
    bitsandbytes()
    library = importlib.import_module("bitsandbytes.nn")
    recipe, compute, _ = stored
    kind, block, double = recipe.storage
    weight = old.weight.detach().T if recipe.turned else old.weight.detach()
    rows, columns = recipe.shape
    with torch.device("meta"):
        layer = library.Linear4bit(
            columns, rows, bias=False, compute_dtype=compute, quant_type=kind
        )
    layer.weight = library.Params4bit(
        weight.contiguous(),
        requires_grad=False,
        blocksize=block,
        compress_statistics=double,
        quant_type=kind,
    ).to(weight.device)
    layer.bias = old.bias
    setattr(*owner_of(module, name.removesuffix(".weight")), layer.train(old.training))


def _declare(model: PreTrainedModel, stored: Mapping[str, PackedWeight]) -> None:
    """Say in the model's config which of its layers are in four bits.

    The file holds the storage of each weight; the config has room for one dtype of products.
    """
    recipe, compute, _ = next(iter(stored.values()))
    kind, _, double = recipe.storage
    packed = {name.rpartition(".")[0] for name in stored}
    others = [
        path
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and path not in packed
    ]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute or model.dtype,
        llm_int8_skip_modules=others,
    )
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    kept = quantizer.get_modules_to_not_convert(model, others, model._keep_in_fp32_modules)
    lost = next((path for path in sorted(packed) if not should_convert_module(path, kept)), None)
    if lost is not None:
        raise _no_layer(f"transformers never loads '{lost}' of a {type(model).__name__} in 4 bits")
    model.config.quantization_config = config
    model.hf_quantizer = quantizer


def _no_layer(message: str) -> SurgeryError:
    hint = "fold in full precision, or have the rule keep that weight as it is"
    return SurgeryError("PSG406", message, hint)
