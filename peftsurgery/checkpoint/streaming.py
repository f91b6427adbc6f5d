"""The streamed fold: a checkpoint in, a folded one out, with the memory of a few rows.

Every file of the base is written again, in the same order and under the same name: tensors that the
plan changes with their new values, all others byte for byte. Every tensor is hashed on the way, so
that the certificate says what was read and what was written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from peftsurgery.checkpoint.arrays import FLOATS
from peftsurgery.checkpoint.certificate import certificate, is_as_said
from peftsurgery.checkpoint.codecs.coded import BESIDE, CONFIG, PlainView, needed_view
from peftsurgery.checkpoint.fold_report import FoldReport
from peftsurgery.checkpoint.fold_tensor import Folding
from peftsurgery.checkpoint.hashing import ALGORITHM
from peftsurgery.checkpoint.part_folder import PartFolder, part_folder
from peftsurgery.checkpoint.plan import FoldPlan, Planned
from peftsurgery.checkpoint.record import FILE, folded_into
from peftsurgery.checkpoint.residual import RESIDUAL, residual_of
from peftsurgery.checkpoint.shards import Streamed, write_shards
from peftsurgery.errors import SurgeryError
from peftsurgery.model_files import (
    INDEX,
    ModelFiles,
    other_files,
    read_model_files,
)
from peftsurgery.tensor_file import TensorFile, header_of, read_header


def fold_files(
    planned: Planned,
    out: Path,
    dtype: str | None = None,
    resume: bool = False,
    reversible: bool = False,
    progress: Callable[[int], None] | None = None,
    allow_unchanged: bool = False,
) -> FoldReport:
    """Carry out a plan on the files of its base, with the tensors of its adapter; write ``out``.

    ``dtype`` (as safetensors calls it) is given to all tensors of floating-point numbers; with
    ``reversible``, residuals are written beside the weights (:mod:`.residual`). Raises
    SurgeryError: PSG402 and PSG403 for values that cannot be written, PSG415 if nothing would
    change and that is not allowed, PSG416 for tensors that plan and files do not both have, PSG603
    and PSG610 for places.
    """
    plan, adapter, files = planned.plan, planned.adapter, read_model_files(planned.base)
    view = needed_view(files, plan.changed)
    _check(plan, view, adapter, reversible)
    learnt = {name: (adapter, tensor) for name, tensor in adapter.tensors.items()}
    streamed = Streamed(
        Folding(plan, view.tensors, learnt, view.coded),
        view,
        dtype,
        progress or (lambda size: None),
    )
    wanted = {file.path.name: file for file in files.files}
    with part_folder(out, _identity(plan, files, adapter, (dtype, reversible)), resume) as into:
        trusted = tuple(name for name in wanted if _is_whole(into, name))
        write_shards(streamed, into, (file for n, file in wanted.items() if n not in trusted))
        tensors = {tensor: entry for name in wanted for tensor, entry in into.done[name].items()}
        changed = {name: e["change"] for name, e in tensors.items() if "change" in e}
        _check_changed(changed, allow_unchanged)
        added = _write_residuals(into, wanted.values(), tensors) if reversible else []
        folded = [read_header(into.path / name) for name in wanted]
        written = sum(tensor.size for file in folded for tensor in file.tensors.values())
        small = _small_files(plan, view, folded, written)
        for name, content in small.items():
            into.write(name, [content])
        record = {**plan.record, "added": [*added, *plan.files]}
        record |= {"coded": _hashes(view)} if view.coded else {}
        into.write(FILE, [certificate(record, into.path, wanted, tensors)])
    mine = plan.record.get("folded", ())[len(folded_into(planned.base)) :]
    adapters = dict.fromkeys(entry["adapter"] for entry in mine)
    copied = tuple(name for name in small if name not in {INDEX, *plan.files})
    return FoldReport(out, changed, len(tensors), written, trusted, (), tuple(adapters), copied)


def _check_changed(changed: Mapping[str, Any], allow_unchanged: bool) -> None:
    """Refuse a fold that does nothing. PSG415."""
    if not allow_unchanged and not any(each["moved"] for each in changed.values()):
        message = "the fold changes no element of any weight"
        hint = "it is untrained, or too small for the dtype; --allow-unchanged writes it anyway"
        raise SurgeryError("PSG415", message, hint)


def _write_residuals(
    into: PartFolder, files: Iterable[TensorFile], tensors: Mapping[str, dict[str, Any]]
) -> list[str]:
    """Write residuals beside each file with changed tensors, whose entries say where they are."""
    names = []
    for file in files:
        held = sorted(file.tensors.values(), key=lambda tensor: tensor.start)
        changed = [tensor for tensor in held if "base" in tensors[tensor.name]]
        name = f"{file.path.name}{RESIDUAL}"
        if changed:
            said: dict[str, int] = {}
            now = read_header(into.path / file.path.name)
            into.write(name, residual_of(file, now, [each.name for each in changed], said), said)
        if changed:
            names.append(name)
            for tensor, start in into.done[name].items():
                tensors[tensor]["residual"] = [name, start]
    return names


def _check(plan: FoldPlan, files: PlainView, adapter: TensorFile, reversible: bool) -> None:
    """Refuse a plan whose tensors are not there, and an adapter that it leaves out. PSG416."""
    if files.coded and reversible:
        message = f"'{files.folder}' is quantised and is written plain, which has no residual"
        raise SurgeryError("PSG416", message, "unfold from the base itself")
    needed = {name for site in plan.sites for name in site.weights.values()} | plan.replaced.keys()
    for name in sorted(needed):
        if name not in files.tensors:
            raise SurgeryError("PSG416", f"'{name}' is in no file of '{files.folder}'")
        dtype = files.tensors[name][1].dtype
        if dtype not in FLOATS:
            raise SurgeryError("PSG416", f"'{name}' is kept in {dtype}, which cannot be added to")
    for name in sorted(plan.consumed ^ adapter.tensors.keys()):
        where = "the fold does not use" if name in adapter.tensors else "the adapter does not hold"
        raise SurgeryError("PSG416", f"{where} '{name}'")


def _hashes(view: PlainView) -> dict[str, str]:
    """The hashes of all tensors that a codec keeps, by which the base is known again."""
    return {name: each for weight in view.coded.values() for name, each in weight.hashes.items()}


def _small_files(
    plan: FoldPlan, view: PlainView, folded: Iterable[TensorFile], size: int
) -> dict[str, bytes]:
    """The other files: those of the base, those of the plan, and the index.

    An index says how many bytes all tensors have; where they are as many as before, it is kept.
    """
    files, left = view.files, {*plan.without, *(BESIDE if view.coded else ())}
    kept = other_files(files.folder).items()
    contents = {name: path.read_bytes() for name, path in kept if name not in left}
    if view.coded:
        contents[CONFIG] = view.config()
    if files.index is not None:
        contents[INDEX] = (files.folder / INDEX).read_bytes()
        if view.coded or size != sum(tensor.size for _, tensor in files.tensors.values()):
            metadata = {**dict(files.index.get("metadata") or {}), "total_size": size}
            where = {name: file.path.name for file in folded for name in file.tensors}
            index = {**files.index, "metadata": metadata, "weight_map": dict(sorted(where.items()))}
            contents[INDEX] = (json.dumps(index, indent=2) + "\n").encode()
    return {**contents, **plan.files}


def _identity(plan: FoldPlan, files: ModelFiles, adapter: TensorFile, options: Any) -> str:
    """Hash of all that decides what is written: what a run may be resumed by."""
    headers = [header_of(file.tensors.values(), file.metadata) for file in files.files]
    told = repr((str(files.folder.resolve()), plan.sites, plan.replaced, options, ALGORITHM))
    parts = [told.encode(), adapter.path.read_bytes(), *headers]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _is_whole(into: PartFolder, name: str) -> bool:
    """Whether a file was written by an earlier run and is still what its journal says."""
    said = into.done.get(name)
    return said is not None and is_as_said(into.path / name, said)
