"""Adapter files of any library: validated when read, written whole or not at all.

See :mod:`peftsurgery.files`, which reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from peftsurgery import files
from peftsurgery.errors import SurgeryError
from peftsurgery.finite_tensors import check_tensors, read_tensors


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of an adapter's directory.

    PSG501 if it is missing, is no JSON object, holds a key twice, NaN or infinity.
    """
    if not (folder / name).is_file():
        raise SurgeryError("PSG501", f"'{folder}' has no {name}", nearby(folder, name))
    return files.read_object(folder / name, "PSG501")


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, in memory of their own. PSG505 if it is damaged or not finite."""
    tensors = read_tensors(file, "PSG505")
    _check_any(file, tensors)
    return tensors


def check_adapter_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse a file without tensors, or with some that hold no finite numbers. PSG505."""
    _check_any(file, tensors)
    check_tensors(file, tensors, "PSG505")


def _check_any(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    if not tensors:
        raise SurgeryError("PSG505", f"{file} holds no tensors")


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """A config as the libraries write it."""
    return (json.dumps(dict(config), indent=2, sort_keys=True) + "\n").encode()


def brief(value: Any) -> str:
    """A value of a config inside a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def nearby(folder: Path, marker: str) -> str | None:
    """The adapters that lie one level deeper, which is where libraries put those with names."""
    if not folder.is_dir():
        return "there is no such directory"
    inner = sorted(child.name for child in folder.iterdir() if (child / marker).is_file())
    return f"it holds adapters in {', '.join(inner[:5])}" if inner else None
