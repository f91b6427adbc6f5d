"""Files of adapters, whatever library wrote them: read with suspicion, written whole or not at all.

A config is a JSON object without duplicate keys or NaN; tensors are finite numbers in safetensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..errors import SurgeryError

MAX_CONFIG = 16 * 2**20  # a rank pattern has an entry for each module at most


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. PSG501 if it is none, holds a key twice, NaN or infinity."""
    try:
        if file.stat().st_size > MAX_CONFIG:
            raise SurgeryError("PSG501", f"{file} is larger than {MAX_CONFIG} bytes")
        config = json.loads(
            file.read_text(encoding="utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
        )
    except (OSError, ValueError, RecursionError) as error:
        raise SurgeryError("PSG501", f"{file} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise SurgeryError("PSG501", f"{file} holds no JSON object")
    return config


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, in memory of their own. PSG505 if it is damaged or not finite."""
    try:
        tensors = {name: value.clone() for name, value in load_file(file).items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise SurgeryError("PSG505", f"{file} cannot be read: {error}") from None
    check_tensors(file, tensors)
    return tensors


def check_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse a file without tensors, or with some that hold no finite numbers. PSG505."""
    if not tensors:
        raise SurgeryError("PSG505", f"{file} holds no tensors")
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise SurgeryError("PSG505", f"{file}: '{name}' holds {value.dtype}, not numbers")
        if not torch.isfinite(value).all():
            raise SurgeryError("PSG505", f"{file}: '{name}' holds NaN or infinity")


def as_json(config: Mapping[str, Any]) -> bytes:
    """A config as the libraries write it."""
    return (json.dumps(dict(config), indent=2, sort_keys=True) + "\n").encode()


def as_safetensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Tensors as the content of a safetensors file."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return save(plain, metadata={"format": "pt"})


def write_files(folder: Path, contents: Mapping[str, bytes], marker: str) -> None:
    """Write files by their names in ``folder``, or leave what is there alone.

    PSG601 if the place is not empty and has no file ``marker``, PSG603 if the system refuses.
    """
    if os.path.lexists(folder) and not _is_replaceable(folder, marker):
        raise SurgeryError(
            "PSG601", f"'{folder}' exists and is not an adapter's directory", "choose another name"
        )
    files = [folder / name for name in contents]
    parts = {file: file.with_name(f".{file.name}.part-{os.getpid()}") for file in files}
    try:
        for content, part in zip(contents.values(), parts.values(), strict=True):
            part.parent.mkdir(parents=True, exist_ok=True)
            _write(part, content)
        for file, part in parts.items():
            part.replace(file)
    except OSError as error:
        raise SurgeryError("PSG603", f"'{folder}' cannot be written: {error.strerror}") from error
    finally:
        for part in parts.values():
            if part.parent.is_dir():
                part.unlink(missing_ok=True)


def nearby(folder: Path, marker: str) -> str | None:
    """The adapters that lie one level deeper, which is where libraries put those with names."""
    if not folder.is_dir():
        return "there is no such directory"
    inner = sorted(child.name for child in folder.iterdir() if (child / marker).is_file())
    return f"it holds adapters in {', '.join(inner[:5])}" if inner else None


def _write(part: Path, content: bytes) -> None:
    with part.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _is_replaceable(folder: Path, marker: str) -> bool:
    return folder.is_dir() and (not any(folder.iterdir()) or (folder / marker).is_file())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key '{twice}' appears twice")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number that JSON has")
