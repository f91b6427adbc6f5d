"""Unfolding: a folded checkpoint back into its base, bit for bit.

The base's tensors come from the base itself, or from the output and the residuals beside it. Each
is held to the certificate's hash, so that what is restored is what was folded into, and no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftsurgery.arguments import checked
from peftsurgery.checkpoint.certificate import algorithm_of, read_certificate
from peftsurgery.checkpoint.hashing import new_digest
from peftsurgery.checkpoint.part_folder import part_folder
from peftsurgery.checkpoint.record import FILE
from peftsurgery.checkpoint.residual import chunks_of, unpacked, width_of
from peftsurgery.checkpoint.tensor_bytes import chunks, file_chunks, read_bytes
from peftsurgery.errors import SurgeryError
from peftsurgery.model_files import INDEX, ModelFiles, other_files, read_model_files
from peftsurgery.outputs import check_free
from peftsurgery.tensor_file import Tensor, TensorFile


@dataclass(frozen=True)
class Unfolded:
    """What was restored: the directory, its tensors, how many of them a fold had changed."""

    folder: Path
    tensors: int
    changed: int

    def to_dict(self) -> dict[str, Any]:
        """The result as ``--json`` prints it."""
        return {"out": str(self.folder), "tensors": self.tensors, "changed": self.changed}

    def __str__(self) -> str:
        what = f"{self.tensors} tensors, {self.changed} of which had been folded into"
        return f"'{self.folder}' is the base again: {what}"


@checked
def unfold_checkpoint(
    out: str | Path, restored: str | Path, base: str | Path | None = None
) -> Unfolded:
    """Restore the weights that an adapter was folded into, bit for bit.

    ``out`` is a folded directory with its certificate, ``restored`` what is written. The weights
    are those of ``base``, a directory, if it is given; else they are made of the residuals, if
    ``out`` was written with them; else they are those of the base that the certificate names.
    Raises SurgeryError: PSG417 for a tensor that is not the one that was folded, PSG609 without a
    certificate, PSG207 for weights that cannot be read, PSG418 if there is nothing to restore from.
    """
    folder, target = Path(out), Path(restored)
    said = read_certificate(folder)
    has_residuals = any("residual" in entry for entry in said["tensors"].values())
    origin = None if base is None and has_residuals else _base(said, base)
    check_free(target, [str(folder), *([] if origin is None else [str(origin)])])
    files = read_model_files(folder if origin is None else origin)
    with part_folder(target, _identity(said, files), resume=False) as into:
        for file in files.files:
            into.write(file.path.name, _restored(file, said, origin is None))
        skipped = {FILE, *said.get("added", [])} if origin is None else {FILE}
        for name, path in other_files(files.folder).items():
            if name not in skipped:
                into.write(name, file_chunks(path))
        if files.index is not None:
            into.write(INDEX, file_chunks(files.folder / INDEX))
    changed = sum("base" in entry for entry in said["tensors"].values())
    return Unfolded(target, len(files.tensors), changed)


def _base(said: Mapping[str, Any], given: str | Path | None) -> Path:
    """The directory of the base. PSG418 if it is not known or not there."""
    named = said.get("base") if given is None else given
    if not isinstance(named, str | Path) or not Path(named).is_dir():
        where = "names no directory" if given is None else f"is not '{given}'"
        message = f"what the fold changed is nowhere: there are no residuals, and the base {where}"
        raise SurgeryError("PSG418", message, "give the base's directory, or fold with residuals")
    return Path(named)


def _identity(said: Mapping[str, Any], files: ModelFiles) -> str:
    return hashlib.sha256(repr((said["tensors"], str(files.folder))).encode()).hexdigest()


def _restored(
    file: TensorFile, said: Mapping[str, Any], by_residual: bool
) -> Iterator[bytes | memoryview]:
    """The bytes of one file of the base."""
    algorithm = algorithm_of(said)
    with file.path.open("rb") as stream:
        yield stream.read(file.offset)
    for tensor in sorted(file.tensors.values(), key=lambda each: each.start):
        coded = said.get("coded", {})
        own = {algorithm: coded[tensor.name]} if tensor.name in coded else {}
        entry = own or said["tensors"].get(tensor.name, {})
        digest = new_digest(algorithm)
        is_made = by_residual and "base" in entry
        for block in _unfolded(file, tensor, entry) if is_made else chunks(file, tensor):
            digest.update(block)
            yield block
        if digest.hexdigest() != entry.get("base", entry.get(algorithm)):
            message = f"'{tensor.name}' of '{file.path}' is not the tensor that was folded"
            raise SurgeryError("PSG417", message)


def _unfolded(file: TensorFile, tensor: Tensor, entry: Mapping[str, Any]) -> Iterator[bytes]:
    """The base's bytes of a tensor that was changed, by its residual."""
    match entry.get("residual"):
        case [str(name), int(start)] if name and Path(name).name == name and 0 <= start < 2**63:
            pass
        case _:
            raise SurgeryError("PSG609", f"the certificate has no residual of '{tensor.name}'")
    for first, size, chunk in chunks_of(file.path.with_name(name), start, tensor):
        after = bytes(read_bytes(file, tensor, first, size))
        try:
            yield unpacked(chunk, after, width_of(tensor))
        except ValueError as error:
            message = f"the residual of '{tensor.name}' is damaged: {error}"
            raise SurgeryError("PSG417", message) from None
