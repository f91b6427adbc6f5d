"""What a fold makes of weights that were kept in four bits, and the error of what it writes.

The new weight is the unpacked one and the update, added in fp32. Written in full precision it is
rounded to the base's dtype; packed again, it moves to the nearest of sixteen numbers in each block.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import SurgeryError
from .packing import bitsandbytes, pack, unpack
from .storing import Stored


@dataclass(frozen=True)
class FoldError:
    """How far written weights are from the exact ones: at most, at which, and on average."""

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


def error_of(
    exact: Mapping[str, torch.Tensor],
    written: Mapping[str, torch.Tensor],
    stored: Mapping[str, Stored],
) -> FoldError:
    """The error of ``written`` against ``exact``, by name; those in ``stored`` are packed again."""
    largest, worst, total, count = 0.0, None, 0.0, 0
    for name, value in exact.items():
        final = written[name]
        if name in stored:
            final = unpack(pack(final, stored[name].recipe), stored[name].recipe)
        gap = (final.to(value.dtype) - value).abs()
        total, count = total + float(gap.sum(dtype=torch.float64)), count + gap.numel()
        if worst is None or float(gap.max()) > largest:
            largest, worst = float(gap.max()), name
    return FoldError(len(exact), largest, worst, total / max(count, 1))


def pack_layers(module: nn.Module, stored: Mapping[str, Stored]) -> None:
    """Make the layers of these weights bitsandbytes' own, in place.

    PSG406 for a weight that is not that of a linear layer.
    """
    bitsandbytes()
    library = importlib.import_module("bitsandbytes.nn")
    for name, (recipe, compute, _) in stored.items():
        path, _, leaf = name.rpartition(".")
        old = module.get_submodule(path)
        if not isinstance(old, nn.Linear | Conv1D) or leaf != "weight":
            raise SurgeryError(
                "PSG406",
                f"'{name}' is the weight of a {type(old).__name__}, which has no four-bit form",
                "fold without requantise=True",
            )
        kind, block, double = recipe.storage
        weight = old.weight.detach().T if recipe.flipped else old.weight.detach()
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
        parent, _, child = path.rpartition(".")
        setattr(module.get_submodule(parent), child, layer.train(old.training))
