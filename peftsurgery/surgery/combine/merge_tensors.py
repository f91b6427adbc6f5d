"""Weighted sums of tensors, some of whose entries are left out: task arithmetic and its kin.

    peft_linear       sum of w t                            (Ilharco et al., 2023, arXiv:2212.04089)
    magnitude_prune   the largest entries of each alone
    ties              the largest entries, and of those the ones that have the sign of most
                      (Yadav et al., 2023, arXiv:2306.01708)
    dare_linear       entries at random, the rest of them made larger to match
    dare_ties         both                                      (Yu et al., 2024, arXiv:2311.03099)

Equal to peft's ``merge_utils``, random numbers included.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from peftsurgery.errors import SurgeryError

Majority = Literal["total", "frequency"]


@dataclass(frozen=True)
class Merge:
    """How tensors are merged: which entries of each are kept, and whether signs are elected."""

    keep: Literal["all", "largest", "random"] = "all"
    elect: bool = False
    density: float = 1.0
    majority: Majority = "total"

    def __call__(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The merged tensor, of the shape that all of them have."""
        kept = torch.stack([self.prune(tensor) for tensor in tensors])
        shape = (-1,) + (1,) * tensors[0].ndim
        weighted = kept * torch.tensor(weights, dtype=kept.dtype, device=kept.device).view(shape)
        if not self.elect:
            return weighted.sum(0)
        score = kept if self.majority == "total" else kept.sign()
        agree = kept.sign() == torch.where(score.sum(0) >= 0, 1, -1)
        return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)

    def prune(self, tensor: Tensor) -> Tensor:
        """Zero the entries of a tensor that are not kept."""
        if self.keep == "all" or self.density == 1:
            return tensor
        if self.keep == "random":
            mask = torch.bernoulli(torch.full_like(tensor, self.density))
            return tensor * mask / self.density
        mask = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        mask[tensor.abs().flatten().topk(int(self.density * tensor.numel())).indices] = 1
        return tensor * mask.view(tensor.shape)


MERGES: Mapping[str, Merge] = {
    "peft_linear": Merge(),
    "magnitude_prune": Merge("largest"),
    "ties": Merge("largest", elect=True),
    "dare_linear": Merge("random"),
    "dare_ties": Merge("random", elect=True),
}


def merge_named(how: str, density: float | None, majority: Majority) -> Merge:
    """The merge of that name, which there is. PSG317 if its density is not given rightly."""
    if majority not in ("total", "frequency"):
        raise SurgeryError("PSG317", f"a majority is 'total' or 'frequency', not '{majority}'")
    known = MERGES[how]
    needed = known.keep != "all"
    if needed != (density is not None):
        verb = "needs" if needed else "has no"
        raise SurgeryError("PSG317", f"'{how}' {verb} density, the share of entries that are kept")
    if density is not None and not (is_number(density) and 0 < density <= 1):
        raise SurgeryError("PSG317", f"a density is above 0 and at most 1, not {density!r:.60}")
    return Merge(known.keep, known.elect, 1.0 if density is None else density, majority)


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number, and neither true nor false."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    return real and abs(value) <= sys.float_info.max
