"""What every comparison with peft does: outputs, twenty steps of AdamW on both, files and folds."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.surgery.model.operated import OperatedModel
from tests.parity.models import batch

Draw = Callable[[int, int], dict[str, Tensor]]


def logits(model: Any, rows: int = 3, length: int = 7) -> Tensor:
    """The logits of a batch, without gradients."""
    with torch.no_grad():
        result: Tensor = model(**batch(rows, length)).logits
    return result


def both_train(*models: Any, draw: Draw = batch, rate: float = 3e-3) -> list[list[float]]:
    """The losses of copies of these models, in train mode, over the same twenty batches."""
    return [train(deepcopy(model).train(), draw, rate) for model in models]


def train(model: Any, draw: Draw = batch, rate: float = 3e-3) -> list[float]:
    """The losses of twenty AdamW steps on batches of ``draw(rows, length)``."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate)
    losses = []
    for step in range(20):
        loss = model(**draw(3, 6 + step % 3)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[18] < losses[0], "two losses on the same batch"
    return losses


def assert_written_as_read(ours: OperatedModel, read: Path, folder: Path, plain: nn.Module) -> None:
    """What ``to_peft`` writes is what was read, bit by bit, and peft computes the same with it."""
    ps.to_peft(ours, folder)
    before, after = (load_file(d / "adapter_model.safetensors") for d in (read, folder))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    again = PeftModel.from_pretrained(plain, folder).eval()
    torch.testing.assert_close(logits(again), logits(ours), rtol=0, atol=1e-6)


def assert_folded_as_merged(ours: OperatedModel, theirs: Any) -> None:
    """``fold`` gives what peft's merge gives, and what the operated model computes."""
    folded, merged = ps.fold(ours), deepcopy(theirs).merge_and_unload()
    assert type(folded) is type(merged)
    torch.testing.assert_close(logits(folded), logits(merged), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(folded), logits(ours), rtol=0, atol=2e-6)
