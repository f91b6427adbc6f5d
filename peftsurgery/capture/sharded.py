"""Tensors that are sharded over processes, as FSDP2 and tensor parallelism leave them: DTensors.

A sharded tensor is put together by all processes that hold a part of it: what does so here is to be
called by all of them, in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn

from peftsurgery.errors import SurgeryError


def is_sharded(tensor: Any) -> bool:
    """Whether other processes hold parts of a tensor."""
    return hasattr(tensor, "full_tensor")  # DTensor, whose module takes time to import


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the parts of all processes; gradients of the whole reach this one's part."""
    full: Any = tensor
    return full.full_tensor() if is_sharded(full) else tensor


def sharded_like(value: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """The part of a whole value that this process holds, if ``stored`` is one; else the value."""
    if not is_sharded(stored):
        return value
    from torch.distributed.tensor import distribute_tensor

    like: Any = stored
    return distribute_tensor(value, like.device_mesh, like.placements)


def first_sharded(module: nn.Module) -> str | None:
    """Name of the first parameter that is sharded, None if all are whole."""
    return next((name for name, value in module.named_parameters() if is_sharded(value)), None)


def check_whole(module: nn.Module) -> None:
    """Refuse a model with sharded parameters. PSG225."""
    name = first_sharded(module)
    if name is not None:
        message = f"other processes hold parts of '{name}'"
        hint = "save() the model in all of them, and load the surgery in one"
        raise SurgeryError("PSG225", message, hint)


def by_the_first(act: Callable[[], None]) -> None:
    """Let the first process act while the others wait; what it is refused, all are."""
    refused: list[Any] = [None]
    if not distributed.get_rank():
        try:
            act()
        except SurgeryError as error:
            refused = [error.args]
    distributed.broadcast_object_list(refused)
    await_released()
    if refused[0] is not None:
        raise SurgeryError(*refused[0])


def await_released(limit: float = 5.0) -> None:
    """Wait, ``limit`` seconds at most, until threads of gloo have let go of what was sent so far.

    Such a thread needs Python to let go of a tensor, and aborts a process whose Python has ended
    meanwhile (torch 2.13): saving is often the last that a program does.
    """
    if "gloo" not in distributed.get_backend():
        return
    token: Any = torch.zeros(1)
    distributed.broadcast(token, 0)
    end = time.monotonic() + limit
    while token._use_count() > 1 and time.monotonic() < end:
        time.sleep(0.001)
