"""Tensors that a trace cannot tell from one another: what they are, and how another one is made."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from peftsurgery.capture.equal_blocks.size_questions import expression
from peftsurgery.capture.tensors import fake_like


def described(tensor: torch.Tensor) -> tuple[Any, ...]:
    """All that a trace can see of a tensor but which one it is."""
    return sizes(tensor), kind(tensor)


def sizes(tensor: torch.Tensor) -> tuple[Any, ...]:
    """The numbers of a tensor of which a trace may learn more."""
    shape, stride = (tuple(map(expression, each)) for each in (tensor.shape, tensor.stride()))
    return shape, stride, expression(tensor.storage_offset())


def kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What a tensor is, whatever its sizes."""
    return (
        *(type(tensor), tensor.dtype, tensor.device, tensor.layout, tensor.ndim),
        *(tensor.requires_grad, tensor.is_leaf),
        *(tensor.is_conj(), tensor.is_neg(), tensor.is_inference()),
    )


def like(tensor: torch.Tensor) -> torch.Tensor | None:
    """A new tensor that a trace cannot tell from this one; None if there is none."""
    told = described(tensor)
    for make in (_Anew.apply, torch.Tensor.clone):
        made: torch.Tensor = make(tensor)
        if described(made) == told:
            return made
    return None


class _Anew(torch.autograd.Function):
    """A fake tensor of the same sizes, made without an operator, which would compute each anew."""

    @staticmethod
    def forward(ctx: Any, tensor: Any) -> torch.Tensor:
        with unset_fake_temporarily():
            return fake_like(tensor.fake_mode, tensor, tensor.dtype, tensor.fake_device)
