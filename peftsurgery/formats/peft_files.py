"""The two files of a peft adapter: read with suspicion, written whole or not at all.

    adapter_config.json          what kind of adapter it is, and where it goes
    adapter_model.safetensors    its tensors

Adapters in pickle files (``adapter_model.bin``) are refused: loading one can run code.
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

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MAX_CONFIG = 16 * 2**20  # a rank pattern has an entry for each module at most


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's config. PSG501 if it is missing, is no JSON object or holds NaN."""
    file = folder / CONFIG
    if not file.is_file():
        raise SurgeryError("PSG501", f"'{folder}' has no {CONFIG}", _nearby(folder))
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


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter's tensors, in memory of their own. PSG505 if there are none or not finite."""
    file = folder / TENSORS
    if not file.is_file():
        if (folder / PICKLE).exists():
            raise SurgeryError(
                "PSG505",
                f"'{folder}' holds its tensors in {PICKLE}, a pickle, which is never loaded",
                "save the adapter again with peft's save_pretrained(safe_serialization=True)",
            )
        raise SurgeryError("PSG505", f"'{folder}' has no {TENSORS}", _nearby(folder))
    try:
        tensors = {name: value.clone() for name, value in load_file(file).items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise SurgeryError("PSG505", f"{file} cannot be read: {error}") from None
    if not tensors:
        raise SurgeryError("PSG505", f"{file} holds no tensors")
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise SurgeryError("PSG505", f"{file}: '{name}' holds {value.dtype}, not numbers")
        if not torch.isfinite(value).all():
            raise SurgeryError("PSG505", f"{file}: '{name}' holds NaN or infinity")
    return tensors


def write_adapter(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write both files, or leave what is there alone.

    PSG601 if the place holds anything but an adapter, PSG603 if the system refuses.
    """
    if os.path.lexists(folder) and not _is_replaceable(folder):
        raise SurgeryError(
            "PSG601", f"'{folder}' exists and is not an adapter's directory", "choose another name"
        )
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    contents = {
        TENSORS: save(plain, metadata={"format": "pt"}),
        CONFIG: (json.dumps(dict(config), indent=2, sort_keys=True) + "\n").encode(),
    }
    parts = {folder / name: folder / f".{name}.part-{os.getpid()}" for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for content, part in zip(contents.values(), parts.values(), strict=True):
            _write(part, content)
        for file, part in parts.items():
            part.replace(file)
    except OSError as error:
        raise SurgeryError("PSG603", f"'{folder}' cannot be written: {error.strerror}") from error
    finally:
        for part in parts.values():
            if part.parent.is_dir():
                part.unlink(missing_ok=True)


def _write(part: Path, content: bytes) -> None:
    with part.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _is_replaceable(folder: Path) -> bool:
    return folder.is_dir() and (not any(folder.iterdir()) or (folder / CONFIG).is_file())


def _nearby(folder: Path) -> str | None:
    """The adapters that lie one level deeper, which is where peft puts those with names."""
    if not folder.is_dir():
        return "there is no such directory"
    inner = sorted(child.name for child in folder.iterdir() if (child / CONFIG).is_file())
    return f"it holds adapters in {', '.join(inner[:5])}" if inner else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key '{twice}' appears twice")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number that JSON has")
