"""Certificates of folded checkpoints: ``peftsurgery.json``, by which an output can be checked.

It has the hash of every tensor that was written and of every other file, and of each tensor that
was changed the hash of the base's, how far it was moved, and how far it was rounded. ``algorithm``
names how it was hashed, and is what a tensor's entry calls its own hash.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftsurgery.arguments import checked
from peftsurgery.checkpoint.hashing import (
    ALGORITHM,
    ALGORITHMS,
    BEFORE,
    hash_of,
    hash_of_file,
    hash_of_header,
)
from peftsurgery.checkpoint.record import FILE
from peftsurgery.errors import SurgeryError
from peftsurgery.files import read_object
from peftsurgery.model_files import read_model_files
from peftsurgery.tensor_file import read_header


def certificate(
    record: Mapping[str, Any], folder: Path, weights: Iterable[str], tensors: Mapping[str, Any]
) -> bytes:
    """Certificate of a directory: what was folded, and what is in it.

    ``weights`` are the names of its safetensors files, ``tensors`` what is said of each tensor.
    """
    kept = {*weights, FILE}
    files = {name: hash_of_file(folder / name) for name in _names(folder) if name not in kept}
    headers = {name: hash_of_header(read_header(folder / name)) for name in sorted(weights)}
    hashes = {"algorithm": ALGORITHM, "tensors": tensors, "headers": headers, "files": files}
    said = {**record, **hashes}
    return (json.dumps(said, indent=1, default=str) + "\n").encode()


@dataclass(frozen=True)
class Verified:
    """What was checked in a directory against its certificate."""

    folder: Path
    tensors: int
    files: int
    changed: int

    def to_dict(self) -> dict[str, Any]:
        """The result as ``--json`` prints it."""
        counts = {"tensors": self.tensors, "files": self.files, "changed": self.changed}
        return {"out": str(self.folder), **counts}

    def __str__(self) -> str:
        what = f"{self.tensors} tensors ({self.changed} of them folded) and {self.files} files"
        return f"'{self.folder}' is what its certificate says: {what}"


@checked
def verify(out: str | Path) -> Verified:
    """Check a folded directory against its own certificate: every tensor, header and file.

    Raises SurgeryError: PSG417 for anything that is not as it was written, PSG609 for a certificate
    that is none, PSG207 for weights that cannot be read.
    """
    folder = Path(out)
    said = read_certificate(folder)
    wrong = next(_differences(folder, said), None)
    if wrong is not None:
        raise SurgeryError("PSG417", f"{wrong} in '{folder}' is not what was written")
    changed = sum("base" in entry for entry in said["tensors"].values())
    return Verified(folder, len(said["tensors"]), len(said["files"]), changed)


def read_certificate(folder: Path) -> dict[str, Any]:
    """The certificate in a directory. PSG609 if there is none, or one of another kind."""
    said = read_object(folder / FILE, "PSG609")
    algorithm = algorithm_of(said)
    if algorithm not in list(ALGORITHMS):  # it may be anything, also what has no hash
        message = f"{folder / FILE} was made with the algorithm {algorithm!r:.40}"
        raise SurgeryError("PSG609", message, f"known here: {', '.join(ALGORITHMS)}")
    tensors, headers, files = (said.get(name) for name in ("tensors", "headers", "files"))
    if not (isinstance(tensors, dict) and isinstance(headers, dict) and isinstance(files, dict)):
        message = f"{folder / FILE} has no hashes of what was written"
        raise SurgeryError("PSG609", message, "fold again with fold_checkpoint")
    are_entries = all(isinstance(entry, dict) for entry in tensors.values())
    hashes = [entry.get(algorithm) for entry in tensors.values()] if are_entries else [None]
    hashes += [entry["base"] for entry in tensors.values() if are_entries and "base" in entry]
    coded, added = said.get("coded", {}), said.get("added", [])
    if not isinstance(coded, dict) or not isinstance(added, list):
        raise SurgeryError("PSG609", f"{folder / FILE} does not say what was there and what is new")
    texts = (*hashes, *headers.values(), *files.values(), *coded.values(), *added)
    if not all(isinstance(each, str) for each in texts):
        raise SurgeryError("PSG609", f"{folder / FILE} holds hashes that are none")
    return said


def algorithm_of(said: Mapping[str, Any]) -> Any:
    """The algorithm that a certificate names, or is from before there was more than one."""
    return said.get("algorithm", BEFORE)


def is_as_said(path: Path, said: Mapping[str, Any]) -> bool:
    """Whether a safetensors file holds just these tensors with these hashes."""
    try:
        file = read_header(path)
    except SurgeryError:
        return False
    return file.tensors.keys() == said.keys() and all(
        hash_of(file, tensor) == said[name][ALGORITHM] for name, tensor in file.tensors.items()
    )


def _differences(folder: Path, said: Mapping[str, Any]) -> Iterator[str]:
    """What is not as the certificate says."""
    files, algorithm = read_model_files(folder), algorithm_of(said)
    headers = {file.path.name: hash_of_header(file, algorithm) for file in files.files}
    names = {name for name in _names(folder) if name not in headers and name != FILE}
    for name in sorted(headers.keys() | said["headers"].keys()):
        if headers.get(name) != said["headers"].get(name):
            yield f"the header of '{name}'"
    for name in sorted(names | said["files"].keys()):
        wanted = said["files"].get(name)
        if name not in names or hash_of_file(folder / name, algorithm) != wanted:
            yield f"'{name}'"
    held = files.tensors
    for name in sorted(held.keys() | said["tensors"].keys()):
        if (
            name not in held
            or name not in said["tensors"]
            or hash_of(*held[name], algorithm) != said["tensors"][name][algorithm]
        ):
            yield f"the tensor '{name}'"


def _names(folder: Path) -> list[str]:
    """The files beneath a directory, hidden ones left out."""
    found = (Path(around, name) for around, _, names in os.walk(folder) for name in names)
    paths = (path.relative_to(folder) for path in found)
    return sorted(str(path) for path in paths if not any(p.startswith(".") for p in path.parts))
