"""Saved surgeries: a directory with the rules, a manifest and what was learnt.

    surgery.json           format, base and its fingerprint, for each operation its name, rule file
                           and settings, which adapters are active; versions, seed and date; how the
                           base is built (see saved_build.py); which adapter trains which parameters
                           of the base, which buffers moved, what a combination lacks
    rules/0_lora_qv.yaml   the rule files, as they were applied
    adapter.safetensors    every parameter the rules added or trained, and every buffer that the
                           training moved, by its name in the model

No weights of the base and no pickle.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftsurgery import files
from peftsurgery.capture.fingerprint import Fingerprint, content_digest, weights_of
from peftsurgery.capture.sources import Source
from peftsurgery.errors import SurgeryError
from peftsurgery.language import dump_rules, load_rules, resolve_settings
from peftsurgery.language.where import Where, where_of
from peftsurgery.places import object_in
from peftsurgery.surgery.model.provenance import now, versions
from peftsurgery.surgery.model.same_base import Made
from peftsurgery.surgery.model.saved_build import ROWS, build_contents, tokenizer_files
from peftsurgery.surgery.plan.cut import Operation, is_adapter_name
from peftsurgery.surgery.plan.origin import Origin

MANIFEST, TENSORS, RULES, FORMAT = "surgery.json", "adapter.safetensors", "rules", 1

# A base may have complex parameters, and rules may train them; its buffers may count and mark.
TRAINABLE = (*files.FLOATS, torch.complex64, torch.complex128)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
KEPT = (*TRAINABLE, *WHOLE)


@dataclass(frozen=True)
class Saved:
    """The adapters of a model, of which a surgery is to hold some.

    ``source`` is that of their base, ``left_out`` the layers in which they do nothing, ``lost`` the
    share that they lack of the changes they were combined of, ``trained`` the adapters by the
    base's parameters that they train; ``learnt`` is what those that are saved added and trained,
    ``moved`` the buffers that training moved, by their names in the model.
    """

    source: Source
    operations: Sequence[Operation]
    active: Sequence[str]
    left_out: Mapping[str, Sequence[int | str]]
    lost: Mapping[str, float]
    trained: Mapping[str, str]
    learnt: Mapping[str, torch.Tensor]
    moved: Mapping[str, torch.Tensor]


def write_surgery(path: Path, names: Collection[str], saved: Saved) -> None:
    """Write the adapters of these names to ``path``, over the surgery that is there.

    PSG604 if something else is there.
    """
    operations = [operation for operation in saved.operations if operation.name in names]
    rules = [f"{RULES}/{n}_{op.file.name}.yaml" for n, op in enumerate(operations)]
    entries = [_entry(*each, saved.lost) for each in zip(operations, rules, strict=True)]
    built, more = build_contents(saved.source.build)
    weights = weights_of(saved.source)
    said = {
        "trained": {name: owner for name, owner in saved.trained.items() if owner in names},
        "buffers": [*saved.moved],
        "left_out": {name: layers for name, layers in saved.left_out.items() if name in names},
    }
    manifest = {
        "format": FORMAT,
        "base": saved.source.origin,
        "model": type(saved.source.module).__name__,
        "operations": entries,
        "active": [name for name in saved.active if name in names],
        "versions": versions(),
        "seed": torch.initial_seed(),
        "date": now(),
        **built,
        **{key: value for key, value in said.items() if value},
        "fingerprint": None if weights is None else weights.fingerprint.to_dict(),
    }
    texts = zip(rules, operations, strict=True)
    contents = more | {file: dump_rules(operation.file).encode() for file, operation in texts}
    contents[TENSORS] = files.as_safetensors({**saved.learnt, **saved.moved})
    contents[MANIFEST] = json.dumps(manifest, indent=2).encode()
    older = _of_build(path)
    files.write_files(path, contents, MANIFEST, "PSG604", "a saved surgery")
    _remove_stale(path, older, [*rules, *contents])


def parts_of(path: Path) -> tuple[Path, ...]:
    """Where a surgery in a directory is written."""
    return path / MANIFEST, path / TENSORS, path / RULES


def is_updated(path: Path, operations: Iterable[Operation], names: Collection[str]) -> bool:
    """Whether ``path`` is a surgery that operations were read from, and all in it is saved again.

    So what was loaded, and trained further, goes back to its place; nothing there is lost.
    """
    folders = [op.origin.folder for op in operations if op.origin.folder is not None]
    if not os.path.isdir(path) or path.resolve() not in [folder.resolve() for folder in folders]:
        return False
    entries = object_in(path / MANIFEST).get("operations")
    held = [entry.get("name") for entry in entries] if isinstance(entries, list) else []
    return bool(held) and all(name in names for name in held)


def _of_build(path: Path) -> list[Path]:
    """The files in a saved surgery that are there for its build, if it has one."""
    has_build = bool(object_in(path / MANIFEST).get("build"))
    return [path / name for name in (ROWS, *(tokenizer_files(path) if has_build else ()))]


def _remove_stale(path: Path, older: Iterable[Path], named: Collection[str]) -> None:
    """Remove the files of an older surgery that the new one does not write. PSG603."""
    ours = [f for f in (path / RULES).glob("*.yaml") if re.fullmatch(r"\d+_.*", f.name)]
    stale = [f for f in (*ours, *older) if str(f.relative_to(path)) not in named]
    files.remove(stale)


def is_surgery(path: Path) -> bool:
    """Whether a directory holds a saved surgery."""
    return (path / MANIFEST).is_file()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a saved surgery. PSG605 if it cannot be read or says what none does."""
    file = path / MANIFEST
    manifest = files.read_object(file, "PSG605")
    said = manifest.get("format")
    if isinstance(said, bool) or said != FORMAT:
        raise SurgeryError("PSG605", f"{file} is not of format {FORMAT}")
    base, entries = manifest.get("base"), manifest.get("operations")
    if base is not None and not isinstance(base, str):
        raise SurgeryError("PSG605", f"{file}: 'base' is {base!r:.60}, which names no model")
    if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
        raise SurgeryError("PSG605", f"{file} lists no operations")
    return manifest


def _is_entry(entry: Any) -> bool:
    """Whether part of a manifest describes an operation."""
    if not isinstance(entry, dict) or not isinstance(entry.get("settings"), dict):
        return False
    name, rules = entry.get("name"), entry.get("rules")
    seed, other = entry.get("seed"), entry.get("other_base")
    lost = entry.get("lost", 0.0)
    share = isinstance(lost, int | float) and not isinstance(lost, bool) and lost >= 0
    said = isinstance(seed, int | None) and isinstance(other, str | None) and share
    return said and is_adapter_name(name) and isinstance(rules, str)


def read_operations(path: Path, manifest: Mapping[str, Any]) -> list[Operation]:
    """The operations of a saved surgery, in order. PSG605 if a rule file is elsewhere."""
    operations = []
    for entry in manifest["operations"]:
        relative = Path(entry["rules"])
        if relative.is_absolute() or ".." in relative.parts:
            raise SurgeryError("PSG605", f"'{relative}' points out of the surgery '{path}'")
        file = load_rules(path / relative)
        settings = resolve_settings(file, entry["settings"])
        origin = Origin(path, seed=entry.get("seed"), other_base=entry.get("other_base"))
        operations.append(Operation(file, settings, entry["name"], origin, _where(path, entry)))
    return operations


def _where(path: Path, entry: Mapping[str, Any]) -> Where:
    """The clauses that narrowed an operation. PSG605 if they are none."""
    try:
        return where_of(entry.get("where", {}), "where")
    except SurgeryError as error:
        message = f"{path / MANIFEST} narrows '{entry['name']}' by no clauses: {error.message}"
        raise SurgeryError("PSG605", message) from None


def saved_operations(path: Path) -> list[Operation]:
    """The operations of a saved surgery; none if a directory holds no surgery. PSG605."""
    return read_operations(path, read_manifest(path)) if is_surgery(path) else []


def read_fingerprint(path: Path, manifest: Mapping[str, Any]) -> Fingerprint | None:
    """The fingerprint of a surgery's base, if it has one. PSG605 if that is damaged."""
    recorded = manifest.get("fingerprint")
    try:
        return None if recorded is None else Fingerprint.parse(recorded)
    except ValueError as error:
        raise SurgeryError("PSG605", f"{path / MANIFEST}: {error}") from None


def read_made(path: Path, manifest: Mapping[str, Any], tensors: Mapping[str, Any]) -> Made:
    """What a saved surgery says of the base it was made for. PSG605 if that is damaged."""
    fingerprint, content = read_fingerprint(path, manifest), content_digest(tensors)
    base, replaced = manifest.get("base"), frozenset(tensors)
    return Made(path, base, content, fingerprint, replaced, records=True)


def read_active(path: Path, manifest: Mapping[str, Any]) -> list[str] | None:
    """The adapters that were active; None, for all, where nothing is said. PSG605 if damaged."""
    active = manifest.get("active")
    names = _names(manifest)
    if active is None or (isinstance(active, list) and all(name in names for name in active)):
        return active
    raise SurgeryError("PSG605", f"{path / MANIFEST}: 'active' does not list adapters")


def read_left_out(path: Path, manifest: Mapping[str, Any]) -> dict[str, list[int | str]]:
    """The layers in which an adapter does nothing, by its name. PSG605 if damaged."""
    left_out = manifest.get("left_out", {})
    names = _names(manifest)
    if isinstance(left_out, dict) and all(
        name in names and isinstance(layers, list) and all(isinstance(n, int | str) for n in layers)
        for name, layers in left_out.items()
    ):
        return left_out
    raise SurgeryError("PSG605", f"{path / MANIFEST}: 'left_out' does not list layers")


def read_trained(path: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """The adapters by the base's parameters that they train. PSG605 if damaged.

    Nothing of surgeries that were saved before manifests said it.
    """
    trained, names = manifest.get("trained", {}), _names(manifest)
    if isinstance(trained, dict) and all(adapter in names for adapter in trained.values()):
        return trained
    raise SurgeryError("PSG605", f"{path / MANIFEST}: 'trained' does not name adapters")


def read_buffers(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """The buffers that training moved, as the manifest says. PSG605 if damaged."""
    moved = manifest.get("buffers", [])
    if isinstance(moved, list) and all(isinstance(name, str) for name in moved):
        return moved
    raise SurgeryError("PSG605", f"{path / MANIFEST}: 'buffers' does not list names")


def read_lost(manifest: Mapping[str, Any]) -> dict[str, float]:
    """What combined adapters lack of the change that they were combined of, as shares, by name."""
    return {entry["name"]: entry["lost"] for entry in manifest["operations"] if "lost" in entry}


def _names(manifest: Mapping[str, Any]) -> list[str]:
    """The adapters of a manifest; a list, since what is compared with it may be anything."""
    return [entry["name"] for entry in manifest["operations"]]


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What was learnt, and buffers. PSG606 if the file is damaged or holds what is not finite."""
    return files.read_tensors(path / TENSORS, "PSG606", KEPT)


def check_learnt(
    path: Path, tensors: Mapping[str, torch.Tensor], learnt: Mapping[str, torch.Tensor]
) -> None:
    """Refuse counts for a parameter, and complex numbers for a real one. PSG606."""
    files.check_tensors(path / TENSORS, tensors, "PSG606", TRAINABLE)
    for name, value in tensors.items():
        if value.is_complex() and not learnt[name].is_complex():
            message = f"{path / TENSORS}: '{name}' holds {value.dtype}, and the parameter is real"
            raise SurgeryError("PSG606", message)


def _entry(operation: Operation, rules: str, lost: Mapping[str, float]) -> dict[str, Any]:
    """An operation as a manifest lists it; ``rules`` is the name of its rule file."""
    entry = {"name": operation.name, "rules": rules, "settings": operation.own_settings}
    entry |= {"where": operation.where.as_data()} if operation.where.given() else {}
    origin = operation.origin
    said = {
        "seed": origin.seed,
        "other_base": origin.other_base,
        "lost": lost.get(operation.name),
    }
    return entry | {key: value for key, value in said.items() if value is not None}
