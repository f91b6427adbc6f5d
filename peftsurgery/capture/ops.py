"""The few calls in a captured graph that are not ATen operators.

They carry what torch.export bakes in as constants, so that a capture follows ``train()`` and
``eval()`` and runs on whatever device its inputs are on; and they speak to the caller's cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftsurgery.capture.withheld import stand_ins


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


def past_length(cache: Any, layer: int, which: int) -> int:
    """A length of a layer of a cache: of the tokens seen, of those attended to, of the others."""
    length: int = (
        cache.get_seq_length(layer) if which == 0 else cache.get_mask_sizes(0, layer)[which - 1]
    )
    return length


def layer_of(cache: Any, layer: int) -> tuple[Any, int]:
    """One layer of a cache, for the block that it belongs to."""
    return cache, layer


def remember(
    layer: tuple[Any, int], keys: Tensor, values: Tensor, withheld: str = ""
) -> tuple[Tensor, Tensor]:
    """All keys and values (batch, heads, tokens, head_dim) that a cache has with these new ones.

    ``withheld`` names the arguments that the original gives beside them. PSG210 if they are read.
    """
    cache, index = layer
    more, named = stand_ins(withheld)
    both: tuple[Tensor, Tensor] = cache.update(keys, values, index, *more, **named)
    return both


def with_past(new: Tensor, both: tuple[Tensor, Tensor], which: int) -> Tensor:
    """``new`` behind what was remembered: the keys (0) or the values (1) of ``remember``."""
    return both[which]
