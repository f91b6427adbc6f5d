"""The parameters and buffers of a module by name: what they are, which are tied, other dtypes."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from peftsurgery.capture.names import join
from peftsurgery.capture.parts import named_parts
from peftsurgery.capture.program import TensorInfo
from peftsurgery.errors import SurgeryError


def named_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Every parameter and buffer under every name it has."""
    kind, plain = type(module), nn.Module
    if (kind.named_parameters, kind.named_buffers) != (plain.named_parameters, plain.named_buffers):
        return [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
    parts = named_parts(module, remove_duplicate=False)  # as these do, in a third of the time
    return [
        (join(path, name), tensor)
        for key in ("_parameters", "_buffers")
        for path, part in parts
        for name, tensor in getattr(part, key).items()
        if tensor is not None
    ]


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Persistent buffers of a module, by name."""
    return {
        join(path, name): buffer
        for path, part in module.named_modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name not in part._non_persistent_buffers_set
    }


def tensor_names(module: nn.Module) -> dict[str, list[str]]:
    """Every name of a parameter or buffer, with all names of the same tensor."""
    by_tensor: dict[int, list[str]] = {}
    for name, tensor in named_tensors(module):
        by_tensor.setdefault(id(tensor), []).append(name)
    return {name: names for names in by_tensor.values() for name in names}


def tensor_infos(module: nn.Module) -> dict[str, TensorInfo]:
    """Shape and dtype of every parameter and buffer by name, and which of them are tied."""
    named = named_tensors(module)
    counts = Counter(id(tensor) for _, tensor in named)
    ties = {key: n for n, key in enumerate((k for k, c in counts.items() if c > 1), 1)}
    return {
        name: TensorInfo(
            tuple(tensor.shape),
            tensor.dtype,
            isinstance(tensor, nn.Parameter),
            ties.get(id(tensor), False),
        )
        for name, tensor in named
    }


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The part of a module that holds a tensor, and the tensor's name there."""
    owner, _, leaf = name.rpartition(".")
    return module.get_submodule(owner), leaf


def tensor_at(part: nn.Module, table: str, leaf: str) -> torch.Tensor:
    """A parameter or buffer, or what its value is computed of: it may have been parametrised.

    ``table`` is where the module keeps it: "_parameters" or "_buffers".
    """
    stored: torch.Tensor | None = vars(part)[table].get(leaf)
    return parameters_of(part, leaf)[0] if stored is None else stored


def parameters_of(part: nn.Module, leaf: str) -> list[nn.Parameter]:
    """The parameters that a module's tensor is, or is computed of.

    Those are the parametrization's own, or (pruned, normed by a hook) those that are named after
    it: ``weight_orig``, ``weight_g``.
    """
    own = part._parameters.get(leaf)
    if own is not None:
        return [own]
    computed = part._modules.get("parametrizations")
    if isinstance(computed, nn.ModuleDict) and leaf in computed:
        return list(computed[leaf].parameters())
    stored = part._parameters.items()
    return [value for name, value in stored if value is not None and name.startswith(f"{leaf}_")]


def traceable(module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> nn.Module:
    """A module of the same structure with tensors of these dtypes, to be traced and never run.

    That is the module itself if it fits. Otherwise tensors that differ, and tensors on the meta
    device, are fake: they take no memory and claim to be on a real device, so that constants made
    beside them have values. The module is left as it is. PSG201 if it cannot be copied.
    """
    memo: dict[int, Any] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with unset_fake_temporarily():
        for name, tensor in named_tensors(module):
            dtype = dtypes.get(name, tensor.dtype)
            fits = dtype == tensor.dtype and not tensor.is_meta
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor if fits else _fake(mode, tensor, dtype)
    if not is_fake(memo.values()):
        return module
    for part in module.modules():  # most of a module's tables are empty, and copied slowly
        tables = (table for table in vars(part).values() if type(table) is OrderedDict)
        memo |= {id(table): OrderedDict() for table in tables if not table and not vars(table)}
    try:
        return copy.deepcopy(module, memo)
    except (TypeError, RuntimeError) as error:
        message = f"{type(module).__name__} cannot be copied to be captured: {error}"
        raise SurgeryError("PSG201", message) from error


def is_fake(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether some of the tensors have no content at all."""
    return any(isinstance(tensor, FakeTensor) for tensor in tensors)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has content of its own: it is on no meta device and in no transform."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return type(tensor) in (torch.Tensor, nn.Parameter) and not wrapped and not tensor.is_meta


def _fake(mode: FakeTensorMode, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    device = torch.device("cpu") if tensor.is_meta else tensor.device
    fake = fake_like(mode, tensor, dtype, device)
    if isinstance(tensor, nn.Parameter):
        fake.requires_grad_(tensor.requires_grad)
        vars(fake)["_is_param"] = True  # as nn.Parameter makes one of a tensor of another class
    return fake


def fake_like(
    mode: FakeTensorMode, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device
) -> FakeTensor:
    """What ``torch.empty_strided`` makes in the mode, which takes it ten times as long.

    To be called outside of any fake mode.
    """
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="meta")
    return FakeTensor(mode, empty, device)


def number_or_self(value: Any) -> Any:
    """The dtype and number of a tensor that is a single one with content; else the value itself.

    It is read beside any trace, which learns nothing of it.
    """
    if type(value) is not torch.Tensor or value.dim() or value.is_meta:
        return value
    with unset_fake_temporarily(), disable_proxy_modes_tracing():
        return value.dtype, value.item()
