"""What every comparison with peft does: outputs, and twenty steps of AdamW on both."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from tests.parity.models import batch


def logits(model: Any, rows: int = 3, length: int = 7) -> Tensor:
    """The logits of a batch, without gradients."""
    with torch.no_grad():
        result: Tensor = model(**batch(rows, length)).logits
    return result


def both_train(*models: Any) -> list[list[float]]:
    """The losses of copies of these models, in train mode, over the same twenty batches."""
    return [train(deepcopy(model).train()) for model in models]


def train(model: Any) -> list[float]:
    """The losses of twenty AdamW steps."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for step in range(20):
        loss = model(**batch(3, 6 + step % 3)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[18] < losses[0], "two losses on the same batch"
    return losses
