"""The parameters and buffers of a module by name: what they are, which are tied, other dtypes."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from ..errors import SurgeryError
from .program import TensorInfo


def named_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Every parameter and buffer under every name it has."""
    return [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]


def tensor_names(module: nn.Module) -> dict[str, list[str]]:
    """Every name of a parameter or buffer, with all names of the same tensor."""
    by_tensor: dict[int, list[str]] = {}
    for name, tensor in named_tensors(module):
        by_tensor.setdefault(id(tensor), []).append(name)
    return {name: names for names in by_tensor.values() for name in names}


def tensor_infos(module: nn.Module) -> dict[str, TensorInfo]:
    """Shape and dtype of every parameter and buffer by name."""
    return {
        name: TensorInfo(tuple(tensor.shape), tensor.dtype, isinstance(tensor, nn.Parameter))
        for name, tensor in named_tensors(module)
    }


def recast(module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> nn.Module:
    """A module of the same structure whose tensors have these dtypes, to be traced and never run.

    That is the module itself if it fits. Otherwise the tensors that differ are without content
    (memory that is never touched is never given out), and the module is left as it is. PSG201 if it
    cannot be copied.
    """
    memo: dict[int, torch.Tensor] = {}
    for name, tensor in named_tensors(module):
        dtype = dtypes.get(name, tensor.dtype)
        memo[id(tensor)] = tensor if dtype == tensor.dtype else _blank(tensor, dtype)
    if all(id(tensor) == key for key, tensor in memo.items()):
        return module
    try:
        return copy.deepcopy(module, dict(memo))
    except (TypeError, RuntimeError) as error:
        raise SurgeryError(
            "PSG201", f"{type(module).__name__} cannot be captured in another dtype: {error}"
        ) from error


def _blank(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=tensor.device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty
