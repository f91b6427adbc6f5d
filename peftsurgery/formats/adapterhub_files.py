"""The files of AdapterHub's library.

    adapter_config.json                            what kind of adapter it is, and where it goes
    adapter.safetensors or pytorch_adapter.bin     its tensors
    head_config.json, model_head.safetensors       the head that was trained with it, if any

The library cannot write a prefix as safetensors. So its .bin files are read too: only those that
are an archive of plain tensors, through torch's unpickler that knows no other classes
(``weights_only``). What is written here is always safetensors.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import SurgeryError
from .adapter_files import (
    as_json,
    as_safetensors,
    check_tensors,
    nearby,
    read_object,
    read_safetensors,
    write_files,
)

CONFIG, HEAD_CONFIG = "adapter_config.json", "head_config.json"
TENSORS, PICKLED = "adapter.safetensors", "pytorch_adapter.bin"
HEAD, HEAD_PICKLED = "model_head.safetensors", "pytorch_model_head.bin"
# The library keeps a prefix in one place and, under these names, at every layer.
ALIAS, POOL = ".pool.", "prefix_tuning."


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's config. PSG501 if it is missing, is no JSON object or holds NaN."""
    if not (folder / CONFIG).is_file():
        raise SurgeryError("PSG501", f"'{folder}' has no {CONFIG}", nearby(folder, CONFIG))
    return read_object(folder / CONFIG)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter's tensors, each once. PSG505 if there are none, PSG507 if copies differ."""
    tensors = _read(folder, TENSORS, PICKLED)
    if tensors is None:
        raise SurgeryError("PSG505", f"'{folder}' has no {TENSORS}", nearby(folder, CONFIG))
    found = {key: value for key, value in tensors.items() if ALIAS not in key}
    for key, value in tensors.items():
        _, alias, rest = key.partition(ALIAS)
        pooled = [k for k in found if alias and k.endswith(f"{POOL}{rest}")]
        if alias and not (pooled and torch.equal(found[pooled[0]], value)):
            raise SurgeryError("PSG507", f"'{key}' is not what '{POOL}{rest}' is")
    return found


def read_head(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the head; none if there is no head."""
    return _read(folder, HEAD, HEAD_PICKLED) or {}


def _read(folder: Path, safe: str, pickled: str) -> dict[str, torch.Tensor] | None:
    if (folder / safe).is_file():
        return read_safetensors(folder / safe)
    return read_archive(folder / pickled) if (folder / pickled).is_file() else None


def read_archive(file: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file that torch.save wrote. PSG505 if it holds anything else."""
    try:
        with zipfile.ZipFile(file) as archive:
            large = sum(entry.file_size for entry in archive.infolist())
        if large > file.stat().st_size:
            raise SurgeryError("PSG505", f"{file} is compressed, which torch.save's files are not")
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise SurgeryError("PSG505", f"{file} cannot be read: {_line(error)}") from None
    except pickle.UnpicklingError:
        message = f"{file} holds more than tensors, and is not loaded: that can run code"
        raise SurgeryError("PSG505", message, "save it with use_safetensors=True") from None
    plain = isinstance(tensors, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in tensors.items()
    )
    if not plain:
        raise SurgeryError("PSG505", f"{file} holds no tensors by name")
    check_tensors(file, tensors)
    return {name: value.clone() for name, value in tensors.items()}


def adapter_contents(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, bytes]:
    """The files of an adapter by name."""
    return {TENSORS: as_safetensors(tensors), CONFIG: as_json(config)}


def head_contents(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, bytes]:
    """The files of a head by name."""
    return {HEAD: as_safetensors(tensors), HEAD_CONFIG: as_json(config)}


def write_adapter(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write an adapter's files, or leave what is there alone. PSG601 and PSG603."""
    write_files(folder, contents, CONFIG)


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
