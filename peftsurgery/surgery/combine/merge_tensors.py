"""Merges of torch tensors (:mod:`peftsurgery.checkpoint.tensor_merge`).

Equal to peft's ``merge_utils``, random numbers included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftsurgery.checkpoint.tensor_merge import Merge


def merge_tensors(merge: Merge, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The merged tensor, of the shape that all of them have; DARE draws from torch's numbers."""
    merged: Tensor = merge.merged(tensors, weights, _Torch())
    return merged


class _Torch:
    """What torch calls otherwise than numpy."""

    def stack(self, arrays: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(arrays))

    def sign(self, array: Tensor) -> Tensor:
        return array.sign()

    def weights(self, values: Sequence[float], like: Tensor) -> Tensor:
        shape = (-1,) + (1,) * (like.ndim - 1)
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(shape)

    def largest(self, array: Tensor, count: int) -> Tensor:
        mask = torch.zeros(array.numel(), dtype=array.dtype, device=array.device)
        mask[array.abs().flatten().topk(count).indices] = 1
        return mask.view(array.shape)

    def random(self, array: Tensor, share: float) -> Tensor:
        return torch.bernoulli(torch.full_like(array, share))
