"""Weights that captured models run on, in files or in memory, and whether two are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from peftsurgery.capture.sources import Source
from peftsurgery.capture.tensors import persistent_buffers
from peftsurgery.fingerprint import Fingerprint, Sampled, Spans, TensorPrint, in_folder, spans
from peftsurgery.finite_tensors import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def print_as(tensor: Sampled, dtype: str) -> TensorPrint:
    """Print of a tensor as if it were cast to ``dtype`` first."""
    if dtype == tensor.dtype:
        return tensor.print()
    values = torch.frombuffer(
        bytearray(tensor.read(spans(tensor.count))), dtype=DTYPES[tensor.dtype]
    )
    content = _bytes(values.to(DTYPES[dtype]))
    return TensorPrint(dtype, tensor.shape, hashlib.blake2b(content, digest_size=16).hexdigest())


def can_be_cast(tensor: Sampled, dtype: str) -> bool:
    """Whether casting a tensor to ``dtype`` loses nothing that one of ``dtype`` can hold."""
    mine, other = DTYPES.get(tensor.dtype), DTYPES.get(dtype)
    if not (mine and mine.is_floating_point and other and other.is_floating_point):
        return False
    wide, narrow = torch.finfo(mine), torch.finfo(other)
    return wide.eps <= narrow.eps and wide.max >= narrow.max and wide.tiny <= narrow.tiny


@dataclass(frozen=True)
class Weights:
    """A base's tensors by name; ``live`` if they are a module's in memory, all that it has."""

    tensors: Mapping[str, Sampled]
    live: bool

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """The prints of all of them."""
        return Fingerprint({name: each.print() for name, each in self.tensors.items()}, self.live)


def weights_of(source: Source) -> Weights | None:
    """The weights that a captured model runs on, if they are here.

    Those of a model in a directory (or in the hub's cache) are read from its files; a live module's
    are its parameters and persistent buffers, by the names that it would be saved under. PSG207 for
    files that are damaged. A base that was built otherwise is known by what it was before.
    """
    source = source.unbuilt
    if source.on_meta:
        found = {} if source.folder is None else in_folder(source.folder)
    else:
        found = {name: in_memory(tensor) for name, tensor in _saved_as(source.module).items()}
    return Weights(found, live=not source.on_meta) if found else None


def _saved_as(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and persistent buffers, once each, by their names in its files."""
    buffers = persistent_buffers(module)
    first = {id(buffer): name for name, buffer in reversed(buffers.items())}
    once = {name: buffer for name, buffer in buffers.items() if first[id(buffer)] == name}
    named = {**dict(module.named_parameters()), **once}
    plain = {name: tensor.detach() for name, tensor in named.items()}
    return revert_weight_conversion(module, plain) if isinstance(module, PreTrainedModel) else plain


def in_memory(tensor: Tensor) -> Sampled:
    """A tensor that is in memory, of any device."""
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()

    def read(chosen: Spans) -> bytes:
        return b"".join(_bytes(flat[first:end]) for first, end in chosen)

    return Sampled(_dtype_name(tensor.dtype), tuple(tensor.shape), flat.numel(), read)


def _bytes(values: Tensor) -> bytes:
    return values.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _dtype_name(dtype: torch.dtype) -> str:
    return NAMES.get(dtype, str(dtype).removeprefix("torch."))
