"""Weighted sums of tensors, some of whose entries are left out: task arithmetic and its kin.

    peft_linear       sum of w t                            (Ilharco et al., 2023, arXiv:2212.04089)
    magnitude_prune   the largest entries of each alone
    ties              the largest entries, and of those the ones that have the sign of most
                      (Yadav et al., 2023, arXiv:2306.01708)
    dare_linear       entries at random, the rest of them made larger to match
    dare_ties         both                                      (Yu et al., 2024, arXiv:2311.03099)

Said once for any library of arrays: what differs between them is :class:`Arrays`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, Protocol

from peftsurgery.errors import SurgeryError

Majority = Literal["total", "frequency"]


class Arrays(Protocol):
    """What is called differently in different libraries of arrays."""

    def stack(self, arrays: Sequence[Any]) -> Any:
        """Arrays of one shape along a new first axis."""

    def sign(self, array: Any) -> Any:
        """-1, 0 or 1 for each entry."""

    def weights(self, values: Sequence[float], like: Any) -> Any:
        """Numbers along the first axis of ``like``, in its dtype."""

    def largest(self, array: Any, count: int) -> Any:
        """1 where the ``count`` largest absolute values are, else 0."""

    def random(self, array: Any, share: float) -> Any:
        """1 for about this share of the entries, drawn at random, else 0."""


@dataclass(frozen=True)
class Merge:
    """How tensors are merged: which entries of each are kept, and whether signs are elected."""

    keep: Literal["all", "largest", "random"] = "all"
    elect: bool = False
    density: float = 1.0
    majority: Majority = "total"

    def merged(self, tensors: Sequence[Any], weights: Sequence[float], arrays: Arrays) -> Any:
        """The merged tensor, of the shape that all of them have."""
        kept = arrays.stack([self.prune(tensor, arrays) for tensor in tensors])
        weighted = kept * arrays.weights(weights, kept)
        if not self.elect:
            return weighted.sum(0)
        signs = arrays.sign(kept)
        score = kept if self.majority == "total" else signs
        agree = signs == 2 * (score.sum(0) >= 0) - 1
        return (weighted * agree).sum(0) / agree.sum(0).clip(min=1)

    def prune(self, tensor: Any, arrays: Arrays) -> Any:
        """Zero the entries of a tensor that are not kept."""
        if self.keep == "all" or self.density == 1:
            return tensor
        if self.keep == "random":
            return tensor * arrays.random(tensor, self.density) / self.density
        count = 1
        for size in tensor.shape:
            count *= size
        return tensor * arrays.largest(tensor, int(self.density * count))


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
