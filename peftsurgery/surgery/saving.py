"""Saved surgeries: a directory with the rules, a manifest and what was learnt.

    surgery.json           format, base, for each operation its name, rule file and settings, and
                           which adapters are active
    rules/0_lora_qv.yaml   the rule files, as they were applied
    adapter.safetensors    every parameter the rules added or trained, and every buffer that the
                           training moved, by its name in the model

No weights of the base and no pickle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..errors import SurgeryError
from ..language import RuleFile, load_rules, resolve_settings
from .buffers import moved_buffers
from .operation import Operation

if TYPE_CHECKING:
    from .operated import OperatedModel

MANIFEST, TENSORS, RULES, FORMAT = "surgery.json", "adapter.safetensors", "rules", 1


def save_surgery(model: OperatedModel, path: Path, names: Collection[str]) -> None:
    """Write these adapters to ``path``; see :meth:`OperatedModel.save`."""
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or is_surgery(path))):
        raise SurgeryError("PSG604", f"'{path}' exists and is not a saved surgery")
    (path / RULES).mkdir(parents=True, exist_ok=True)
    entries = []
    saved = [operation for operation in model.operations if operation.name in names]
    for number, operation in enumerate(saved):
        file = f"{RULES}/{number}_{operation.file.name}.yaml"
        _write(path / file, dump_rules(operation.file).encode())
        entries.append({"name": operation.name, "rules": file, "settings": _own(operation)})
    write_tensors(path / TENSORS, {**model.learnt(*names), **moved_buffers(model)})
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "base": model.source.origin,
        "model": type(model.source.module).__name__,
        "operations": entries,
        "active": [name for name in model.active if name in names],
    }
    left_out = {name: layers for name, layers in model.left_out.items() if name in names}
    if left_out:
        manifest["left_out"] = left_out
    _write(path / MANIFEST, json.dumps(manifest, indent=2).encode())


def is_surgery(path: Path) -> bool:
    """Whether a directory holds a saved surgery."""
    return (path / MANIFEST).is_file()


def dump_rules(file: RuleFile) -> str:
    """A rule file as YAML text that reads back as the same rules."""
    data = file.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a saved surgery. PSG605 if it cannot be read."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SurgeryError("PSG605", f"{path / MANIFEST} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise SurgeryError("PSG605", f"{path / MANIFEST} is not of format {FORMAT}")
    return manifest


def read_operations(path: Path, manifest: Mapping[str, Any]) -> list[Operation]:
    """The operations of a saved surgery, in order. PSG605 if the manifest does not list them."""
    operations = []
    try:
        for entry in manifest["operations"]:
            name, settings = str(entry["name"]), dict(entry["settings"])
            relative = Path(str(entry["rules"]))
            if relative.is_absolute() or ".." in relative.parts:
                raise SurgeryError("PSG605", f"'{relative}' points out of the surgery '{path}'")
            file = load_rules(path / relative)
            operations.append(Operation(file, resolve_settings(file, settings), name))
    except (KeyError, TypeError, ValueError) as error:
        raise SurgeryError("PSG605", f"{path / MANIFEST} lists no operations: {error!r}") from None
    return operations


def read_active(path: Path, manifest: Mapping[str, Any]) -> list[str] | None:
    """The adapters that were active; None, for all, where nothing is said. PSG605 if damaged."""
    active = manifest.get("active")
    names = {str(entry["name"]) for entry in manifest["operations"]}
    if active is None or (isinstance(active, list) and all(name in names for name in active)):
        return active
    raise SurgeryError("PSG605", f"{path / MANIFEST}: 'active' does not list adapters")


def read_left_out(path: Path, manifest: Mapping[str, Any]) -> dict[str, list[int | str]]:
    """The layers in which an adapter does nothing, by its name. PSG605 if damaged."""
    left_out = manifest.get("left_out", {})
    if isinstance(left_out, dict) and all(isinstance(v, list) for v in left_out.values()):
        return left_out
    raise SurgeryError("PSG605", f"{path / MANIFEST}: 'left_out' does not list layers")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What was learnt. PSG606 if the file is damaged or holds numbers that are not finite."""
    file = path / TENSORS
    try:
        # copies, since arithmetic rounds otherwise where memory is aligned as in the file
        tensors = {name: value.clone() for name, value in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise SurgeryError("PSG606", f"{file} cannot be read: {error}") from None
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise SurgeryError("PSG606", f"{file}: '{name}' holds NaN or infinity")
    return tensors


def _own(operation: Operation) -> dict[str, Any]:
    """The settings that a rule file declares; what it computes from them is left out."""
    return {name: operation.settings[name] for name in operation.file.with_}


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors into a safetensors file, whole or not at all."""
    plain = {name: value.detach().contiguous() for name, value in tensors.items()}
    _write(path, save(plain))


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
