"""The few calls in a captured graph that are not ATen operators.

They carry what torch.export bakes in as constants, so that a capture follows ``train()`` and
``eval()`` and runs on whatever device its inputs are on.
"""

from __future__ import annotations

import torch


def rate(probability: float, training: bool) -> float:
    """The dropout probability of an attention core: ``probability`` in training, else 0."""
    return probability if training else 0.0


def count(batches: torch.Tensor, training: bool) -> torch.Tensor:
    """Add one to a batch norm's counter of batches, in training only."""
    if training:
        batches.add_(1)
    return batches


def device_of(tensor: torch.Tensor) -> torch.device:
    """The device that tensors made inside the graph are made on: that of its first input."""
    return tensor.device
