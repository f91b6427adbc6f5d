"""Saved surgeries: a directory with the rules, a manifest and what was learnt.

    surgery.json           format, base and its fingerprint, for each operation its name, rule file
                           and settings, which adapters are active; versions, seed and date; how the
                           base is built (see build.py); which adapter trains which parameters
                           of the base, which buffers moved, what a combination lacks; what a
                           fold does to the base's files (see checkpoint/model_plan.py)
    rules/0_lora_qv.yaml   the rule files, as they were applied
    adapter.safetensors    every parameter the rules added or trained, and every buffer that the
                           training moved, by its name in the model

No weights of the base and no pickle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftsurgery import files, finite_tensors
from peftsurgery.capture.builds import Build
from peftsurgery.capture.fingerprint import in_memory
from peftsurgery.errors import SurgeryError
from peftsurgery.fingerprint import Fingerprint, content_digest
from peftsurgery.language.loading import load_rules
from peftsurgery.language.settings import resolve_settings
from peftsurgery.language.where import Where, where_of
from peftsurgery.model_files import refuse_program
from peftsurgery.surgery.model.same_base import Made
from peftsurgery.surgery.model.saved.build import read_build
from peftsurgery.surgery.plan.cut import Operation, is_adapter_name
from peftsurgery.surgery.plan.origin import Origin

MANIFEST, TENSORS, RULES, FORMAT = "surgery.json", "adapter.safetensors", "rules", 1

# A base may have complex parameters, and rules may train them; its buffers may count and mark.
TRAINABLE = (*finite_tensors.FLOATS, torch.complex64, torch.complex128)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
KEPT = (*TRAINABLE, *WHOLE)


def is_surgery(path: Path) -> bool:
    """Whether a directory holds a saved surgery."""
    return (path / MANIFEST).is_file()


@dataclass(frozen=True)
class Manifest:
    """What ``surgery.json`` of a saved surgery says, and the rule files that it names.

    ``said`` is all of it, as it is; ``active`` are the adapters that were active (None: all),
    ``left_out`` the layers in which they do nothing, ``trained`` the adapters by the base's
    parameters that they train, ``buffers`` those that training moved, ``lost`` the shares that
    adapters lack of the changes they were combined of. Surgeries that were saved before manifests
    said the latter have nothing of them.
    """

    path: Path
    said: Mapping[str, Any]
    operations: tuple[Operation, ...]
    active: list[str] | None
    left_out: Mapping[str, list[int | str]]
    trained: Mapping[str, str]
    buffers: list[str]
    lost: Mapping[str, float]
    fingerprint: Fingerprint | None
    build: Build

    @property
    def base(self) -> str | None:
        """What names the base, if anything does."""
        return self.said.get("base")

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters, in the order they were applied."""
        return tuple(dict.fromkeys(operation.name for operation in self.operations))

    def made_for(self, tensors: Mapping[str, torch.Tensor]) -> Made:
        """The base that the surgery, with these tensors, was made for."""
        content, replaced = content_digest(map(in_memory, tensors.values())), frozenset(tensors)
        return Made(self.path, self.base, content, self.fingerprint, replaced, records=True)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a saved surgery.

    PSG605 if it cannot be read or says what none does, PSG227 for a program of torch.export.
    """
    refuse_program(path)
    file = path / MANIFEST
    said = files.read_object(file, "PSG605")
    form, base, entries = said.get("format"), said.get("base"), said.get("operations")
    if isinstance(form, bool) or form != FORMAT:
        raise SurgeryError("PSG605", f"{file} is not of format {FORMAT}")
    if base is not None and not isinstance(base, str):
        raise SurgeryError("PSG605", f"{file}: 'base' is {base!r:.60}, which names no model")
    if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
        raise SurgeryError("PSG605", f"{file} lists no operations")
    names = [entry["name"] for entry in entries]  # a list: what is compared with it may be anything
    active, left_out = said.get("active"), said.get("left_out", {})
    trained, moved = said.get("trained", {}), said.get("buffers", [])
    if not (active is None or (isinstance(active, list) and all(n in names for n in active))):
        raise SurgeryError("PSG605", f"{file}: 'active' does not list adapters")
    if not isinstance(left_out, dict) or not all(
        name in names and isinstance(layers, list) and all(isinstance(n, int | str) for n in layers)
        for name, layers in left_out.items()
    ):
        raise SurgeryError("PSG605", f"{file}: 'left_out' does not list layers")
    if not isinstance(trained, dict) or not all(name in names for name in trained.values()):
        raise SurgeryError("PSG605", f"{file}: 'trained' does not name adapters")
    if not isinstance(moved, list) or not all(isinstance(name, str) for name in moved):
        raise SurgeryError("PSG605", f"{file}: 'buffers' does not list names")
    try:
        recorded = said.get("fingerprint")
        fingerprint = None if recorded is None else Fingerprint.parse(recorded)
    except ValueError as error:
        raise SurgeryError("PSG605", f"{file}: {error}") from None
    operations = tuple(_operations(path, said))
    lost = {entry["name"]: entry["lost"] for entry in entries if "lost" in entry}
    kept = active, left_out, trained, moved, lost, fingerprint, read_build(path, said)
    return Manifest(path, said, operations, *kept)


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


def _operations(path: Path, said: Mapping[str, Any]) -> Iterator[Operation]:
    """The operations, in order. PSG605 if a rule file is elsewhere."""
    for entry in said["operations"]:
        relative = Path(entry["rules"])
        if relative.is_absolute() or ".." in relative.parts:
            raise SurgeryError("PSG605", f"'{relative}' points out of the surgery '{path}'")
        file = load_rules(path / relative)
        settings = resolve_settings(file, entry["settings"])
        origin = Origin(path, seed=entry.get("seed"), other_base=entry.get("other_base"))
        yield Operation(file, settings, entry["name"], origin, _where(path, entry))


def _where(path: Path, entry: Mapping[str, Any]) -> Where:
    """The clauses that narrowed an operation. PSG605 if they are none."""
    try:
        return where_of(entry.get("where", {}), "where")
    except SurgeryError as error:
        message = f"{path / MANIFEST} narrows '{entry['name']}' by no clauses: {error.message}"
        raise SurgeryError("PSG605", message) from None


def saved_operations(path: Path) -> list[Operation]:
    """The operations of a saved surgery; none if a directory holds no surgery. PSG605."""
    return list(read_manifest(path).operations) if is_surgery(path) else []


def read_learnt(path: Path) -> dict[str, torch.Tensor]:
    """What was learnt, and buffers. PSG606 if the file is damaged or holds what is not finite."""
    return finite_tensors.read_tensors(path / TENSORS, "PSG606", KEPT)


def check_learnt(
    path: Path, tensors: Mapping[str, torch.Tensor], learnt: Mapping[str, torch.Tensor]
) -> None:
    """Refuse counts for a parameter, and complex numbers for a real one. PSG606."""
    finite_tensors.check_tensors(path / TENSORS, tensors, "PSG606", TRAINABLE)
    for name, value in tensors.items():
        if value.is_complex() and not learnt[name].is_complex():
            message = f"{path / TENSORS}: '{name}' holds {value.dtype}, and the parameter is real"
            raise SurgeryError("PSG606", message)
