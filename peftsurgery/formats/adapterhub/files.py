"""The files of AdapterHub's library.

    adapter_config.json                            what kind of adapter it is, and where it goes
    adapter.safetensors or pytorch_adapter.bin     its tensors
    head_config.json, model_head.safetensors       the head that was trained with it, if any

A fusion is a directory of directories: one for each adapter, one for the fusion itself, and

    adapter_setup.json                             which adapters are fused
    a,b/adapter_fusion_config.json, a,b/model_adapter_fusion.safetensors

The library cannot write a prefix as safetensors. So its .bin files are read too: only those that
are an archive of plain tensors, through torch's unpickler that knows no other classes
(``weights_only``). What is written here is always safetensors.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftsurgery.errors import SurgeryError, first_line
from peftsurgery.finite_tensors import as_safetensors
from peftsurgery.formats.adapter_files import check_adapter_tensors, read_safetensors
from peftsurgery.formats.words import config_bytes, nearby, read_config

SETUP = "adapter_setup.json"


@dataclass(frozen=True)
class FileNames:
    """What the files of one kind of module are called."""

    config: str
    tensors: str
    pickled: str


ADAPTER = FileNames("adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin")
HEAD = FileNames("head_config.json", "model_head.safetensors", "pytorch_model_head.bin")
FUSION = FileNames(
    "adapter_fusion_config.json",
    "model_adapter_fusion.safetensors",
    "pytorch_model_adapter_fusion.bin",
)

# The library keeps a prefix in one place and, under these names, at every layer.
ALIAS, POOL = ".pool.", "prefix_tuning."


def read_hub_config(folder: Path, names: FileNames = ADAPTER) -> dict[str, Any]:
    """A module's config. PSG501 if it is missing, is no JSON object or holds NaN."""
    return read_config(folder, names.config)


def read_hub_tensors(folder: Path, names: FileNames = ADAPTER) -> dict[str, torch.Tensor]:
    """A module's tensors, each once. PSG505 if there are none, PSG507 if copies differ."""
    tensors = _read(folder, names)
    if tensors is None:
        hint = nearby(folder, names.config)
        raise SurgeryError("PSG505", f"'{folder}' has no {names.tensors}", hint)
    found = {key: value for key, value in tensors.items() if ALIAS not in key}
    for key, value in tensors.items():
        _, alias, rest = key.partition(ALIAS)
        pooled = [k for k in found if alias and k.endswith(f"{POOL}{rest}")]
        if alias and not (pooled and torch.equal(found[pooled[0]], value)):
            raise SurgeryError("PSG507", f"'{key}' is not what '{POOL}{rest}' is")
    return found


def read_head(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the head; none if there is no head."""
    return _read(folder, HEAD) or {}


def _read(folder: Path, names: FileNames) -> dict[str, torch.Tensor] | None:
    safe, pickled = folder / names.tensors, folder / names.pickled
    if safe.is_file():
        return read_safetensors(safe)
    return read_archive(pickled) if pickled.is_file() else None


def read_archive(file: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file that torch.save wrote. PSG505 if it holds anything else."""
    try:
        with zipfile.ZipFile(file) as archive:
            large = sum(entry.file_size for entry in archive.infolist())
        if large > file.stat().st_size:
            raise SurgeryError("PSG505", f"{file} is compressed, which torch.save's files are not")
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise SurgeryError("PSG505", f"{file} cannot be read: {first_line(error)}") from None
    except pickle.UnpicklingError:
        message = f"{file} holds more than tensors, and is not loaded: that can run code"
        raise SurgeryError("PSG505", message, "save it with use_safetensors=True") from None
    plain = isinstance(tensors, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in tensors.items()
    )
    if not plain:
        raise SurgeryError("PSG505", f"{file} holds no tensors by name")
    check_adapter_tensors(file, tensors)
    return {name: value.clone() for name, value in tensors.items()}


def module_files(
    names: FileNames,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    folder: str = "",
) -> dict[str, bytes]:
    """The files of a module by their names beneath the directory that is written."""
    inside = f"{folder}/" if folder else ""
    return {
        f"{inside}{names.tensors}": as_safetensors(tensors),
        f"{inside}{names.config}": config_bytes(config),
    }
