"""Ties as the files of a model have them.

A config may tie weights of which the files hold two that differ: transformers, which ties what is
missing or equal, keeps them apart, and so must the model that was built without weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from peftsurgery.capture.tensors import named_tensors, owner_of, tensor_names


def untie_as_stored(model: nn.Module, directory: Path) -> None:
    """Give a model on meta a parameter for each tied weight that the files hold a value of."""
    groups = {id(names): names for names in tensor_names(model).values() if len(names) > 1}
    if not groups:
        return
    try:
        files = dict(_stored(directory))
        for names in groups.values():
            first, *others = [name for name in names if name in files] or [""]
            for name in others:
                if not torch.equal(_read(files, name), _read(files, first)):
                    _untie(model, name)
    except (OSError, SafetensorError):
        return  # read again, and reported, when the weights are wanted


def tied_apart(model: nn.Module, loaded: nn.Module) -> list[str]:
    """Two names that are one weight in ``model`` and two that differ in what was loaded."""
    tensors = dict(named_tensors(loaded))
    for name, (first, *_) in tensor_names(model).items():
        one, other = tensors.get(first), tensors.get(name)
        if one is None or other is None or one is other:
            continue
        if not torch.equal(one, other):
            return [first, name]
    return []


def _stored(directory: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            yield from ((name, file) for name in stored.offset_keys())


def _read(files: dict[str, Path], name: str) -> torch.Tensor:
    with safe_open(files[name], framework="pt") as stored:
        tensor: torch.Tensor = stored.get_tensor(name)
        return tensor


def _untie(model: nn.Module, name: str) -> None:
    old, (part, leaf) = model.get_parameter(name), owner_of(model, name)
    new = nn.Parameter(torch.empty_like(old), requires_grad=old.requires_grad)
    part.register_parameter(leaf, new)
