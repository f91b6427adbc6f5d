"""What an adapter computes, done to the original by forward hooks: an oracle without graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftsurgery.surgery.model.operated import OperatedModel
from tests.models.zoo import ZOO


def randomise(model: OperatedModel, seed: int = 1, scale: float = 0.05) -> OperatedModel:
    """Move every learnt tensor off its start, so that no zero hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.learnt().values():
            value.add_(scale * torch.randn(value.shape, generator=generator).to(value.dtype))
    return model


def losses_of(
    model: OperatedModel, inputs: Mapping[str, Any], rate: float = 1e-2, steps: int = 8
) -> list[float]:
    """The losses of some AdamW steps on one batch."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@contextmanager
def adapted(
    module: nn.Module, pairs: Mapping[str, list[tuple[Tensor, Tensor, float]]]
) -> Iterator[nn.Module]:
    """The original with ``y + s B A x`` added to each named linear, for every (A, B, s)."""
    handles = [
        module.get_submodule(name).register_forward_hook(_adding(added))
        for name, added in pairs.items()
    ]
    try:
        yield module
    finally:
        for handle in handles:
            handle.remove()


def _adding(added: list[tuple[Tensor, Tensor, float]]) -> Any:
    def hook(part: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        for A, B, scale in added:
            y = y + scale * (args[0] @ A.T @ B.T)
        return y

    return hook


def pairs_of(model: OperatedModel, scale: float) -> dict[str, list[tuple[Tensor, Tensor, float]]]:
    """The (A, B, scale) of every adapted module of a model operated with LoRA rules."""
    found: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
    for match in model.report.matches:
        A, B = (model.get_parameter(name).detach() for name in match["added"])
        found.setdefault(match["module"], []).append((A, B, scale))
    return found


def outputs(model: torch.nn.Module, name: str, batch: int = 3, seq: int = 5) -> torch.Tensor:
    # torch's own encoder has a path for inference that rounds otherwise
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        result = model(**ZOO[name].inputs(batch, seq))
    torch.backends.mha.set_fastpath_enabled(True)
    return result if isinstance(result, torch.Tensor) else result[0]
