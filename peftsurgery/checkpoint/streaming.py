"""The streamed fold: a checkpoint in, a folded one out, with the memory of a few rows.

Every file of the base is written again, in the same order and under the same name: tensors that the
plan changes with their new values, all others byte for byte. Every tensor is hashed on the way, so
that the certificate says what was read and what was written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from peftsurgery.checkpoint.arrays import FLOATS
from peftsurgery.checkpoint.certificate import certificate, is_as_said
from peftsurgery.checkpoint.codecs.coded import BESIDE, CONFIG, PlainView
from peftsurgery.checkpoint.fold_report import FoldReport, survival
from peftsurgery.checkpoint.fold_site import is_by_rows
from peftsurgery.checkpoint.fold_tensor import Folding
from peftsurgery.checkpoint.hashing import (
    ALGORITHM,
    hash_of,
    hash_of_bytes,
    hash_of_file,
    new_digest,
)
from peftsurgery.checkpoint.model_plan import IN_MEMORY
from peftsurgery.checkpoint.part_folder import (
    FoldPart,
    Making,
    PartFolder,
    all_parts,
    own_part,
    part_folder,
)
from peftsurgery.checkpoint.plan import FoldPlan, Planned
from peftsurgery.checkpoint.record import FILE, folded_into
from peftsurgery.checkpoint.residual import RESIDUAL, residual_of
from peftsurgery.checkpoint.shards import Streamed, write_shards
from peftsurgery.checkpoint.tensor_bytes import file_chunks
from peftsurgery.checkpoint.ties import settled, view_of
from peftsurgery.errors import SurgeryError
from peftsurgery.model_files import INDEX, other_files, read_model_files
from peftsurgery.stand_ins import called
from peftsurgery.tensor_file import TensorFile, header_of, read_header


def fold_files(
    planned: Planned,
    out: Path,
    dtype: str | None = None,
    resume: bool = False,
    reversible: bool = False,
    progress: Callable[[int], None] | None = None,
    allow_unchanged: bool = False,
    part: FoldPart | None = None,
    finish: bool = False,
    requantise: bool = False,
    made_in: Making = part_folder,
) -> FoldReport:
    """Carry out a plan on the files of its base, with the tensors of its adapter; write ``out``.

    ``dtype`` (as safetensors calls it) is given to all tensors of floating-point numbers; with
    ``reversible``, residuals are written beside the weights (:mod:`.residual`); with
    ``requantise``, what changes of a quantised base is quantised again. ``out`` is ``made_in`` a
    directory beside it unless that is told otherwise. Of several
    processes, each writes a ``part`` of the files of weights, and who finds that all are there
    finishes ``out``; with ``finish``, none is written. Raises SurgeryError: PSG402 and PSG403 for
    values that cannot be written, PSG415 if nothing would change and that is not allowed, PSG416
    for tensors that plan and files do not both have, PSG603 and PSG610 for places, PSG610 if there
    is more to do before ``finish``.
    """
    fold = _prepared(planned, dtype, reversible, progress, requantise)
    if part is None and not finish:
        with made_in(out, fold.identity, resume) as into:
            trusted = fold.write(into, fold.files)
            return replace(fold.finish(into, allow_unchanged), out=out, resumed=trusted)
    mine = None
    if part is not None:
        with own_part(out, fold.identity, part) as into:
            trusted = fold.write(into, part.mine(fold.files))
            mine = replace(fold.report(into, part.mine(fold.files)), out=out, resumed=trusted)
    with all_parts(out, fold.identity, None if part is None else part.of) as whole:
        if isinstance(whole, PartFolder):
            trusted = () if mine is None else mine.resumed
            return replace(fold.finish(whole, allow_unchanged), out=out, resumed=trusted)
    if mine is None:
        which = f": {', '.join(map(str, whole))}" if whole else ""
        message = f"not all parts of '{out}' are written{which}"
        raise SurgeryError("PSG610", message, "run the others first, or wait for them")
    return mine if out.is_dir() else replace(mine, part=str(part))


@dataclass(frozen=True)
class _Fold:
    """A fold that is prepared: what is read and asked for. ``files`` are the base's, by name."""

    planned: Planned
    view: PlainView
    streamed: Streamed
    reversible: bool
    files: Mapping[str, TensorFile]

    @cached_property
    def identity(self) -> str:
        """Hash of all that decides what is written: what a run may be resumed by."""
        plan, adapter = self.planned.plan, self.planned.adapter
        folder, options = (
            called(self.view.folder.resolve()),
            (self.streamed.dtype, self.reversible, bool(self.view.again)),
        )
        headers = [header_of(f.tensors.values(), f.metadata) for f in self.files.values()]
        ties = dict(self.view.added), dict(plan.untied), dict(plan.resized), dict(plan.stacks)
        told = repr((folder, plan.sites, plan.replaced, ties, options, ALGORITHM))
        learnt, whole = hash_of_file(adapter.path), new_digest()
        for part in (hash_of_bytes(told.encode()), learnt, *map(hash_of_bytes, headers)):
            whole.update(part.encode())
        return whole.hexdigest()

    def write(self, into: PartFolder, names: Collection[str]) -> tuple[str, ...]:
        """Write files of weights; those that an earlier run had written, and are as it says."""
        trusted = tuple(name for name in names if _is_whole(into, name))
        write_shards(self.streamed, into, (self.files[n] for n in names if n not in trusted))
        for name in names if self.reversible else ():
            changed = self._changed(into, name)
            if changed:
                now, said = read_header(into.path / name), dict[str, int]()
                blocks = residual_of(self.files[name], now, changed, said)
                into.write(f"{name}{RESIDUAL}", blocks, said)
        return trusted

    def _changed(self, into: PartFolder, name: str) -> list[str]:
        """The tensors of a file that are not as they were, in its order."""
        held = sorted(self.files[name].tensors.values(), key=lambda tensor: tensor.start)
        return [each.name for each in held if "base" in into.done[name].get(each.name, ())]

    def report(self, into: PartFolder, names: Iterable[str]) -> FoldReport:
        """What was done with some files of weights, which are there."""
        tensors = {key: entry for name in names for key, entry in into.done[name].items()}
        changed = {name: entry["change"] for name, entry in tensors.items() if "change" in entry}
        folded = [read_header(into.path / name) for name in names]
        written = sum(tensor.size for file in folded for tensor in file.tensors.values())
        plan = self.planned.plan
        mine = plan.record.get("folded", ())[len(folded_into(self.planned.base)) :]
        adapters = dict.fromkeys(entry["adapter"] for entry in mine)
        return FoldReport(into.path, changed, len(tensors), written, adapters=tuple(adapters))

    def finish(self, into: PartFolder, allow_unchanged: bool) -> FoldReport:
        """Write what is more than weights: the other files, the index and the certificate."""
        plan, report = self.planned.plan, self.report(into, self.files)
        _check_changed(report.changed, allow_unchanged)
        tensors = {key: entry for name in self.files for key, entry in into.done[name].items()}
        added = [*self._residuals(into, tensors), *plan.files]
        folded = [read_header(into.path / name) for name in self.files]
        others = _other_files(plan, self.view, folded)
        for name, blocks in others.items():
            into.write(name, blocks)
        record = {**plan.record, "added": added}
        record |= {"coded": _hashes(self.view)} if self.view.is_plain else {}
        again = survival(report.changed.values())
        record |= {"requantised": again} if again else {}
        into.write(FILE, [certificate(record, into.path, self.files, tensors)])
        copied = tuple(n for n in others if n not in {INDEX, *plan.files})
        return replace(report, copied=copied, untied=bool(plan.untied))

    def _residuals(self, into: PartFolder, tensors: Mapping[str, dict[str, Any]]) -> Iterator[str]:
        """The files of residuals; the entries of their tensors are told where those are."""
        for name in (f"{each}{RESIDUAL}" for each in self.files if self.reversible):
            for tensor, start in into.done.get(name, {}).items():
                tensors[tensor]["residual"] = [name, start]
            if name in into.done:
                yield name


def _prepared(
    planned: Planned,
    dtype: str | None,
    reversible: bool,
    progress: Callable[[int], None] | None,
    requantise: bool,
) -> _Fold:
    """Check a plan against the files that it is carried out on. PSG416."""
    plan, adapter, files = planned.plan, planned.adapter, read_model_files(planned.base)
    view = view_of(plan, files, requantise)
    _check(plan, view, adapter)
    learnt = {name: (adapter, tensor) for name, tensor in adapter.tensors.items()}
    folding, view = settled(Folding(plan, view.tensors, learnt, view.coded, view.held), view)
    folding.check_absent()
    planned = replace(planned, plan=folding.plan)
    _check_residuals(planned.plan, view, reversible)
    streamed = Streamed(folding, view, dtype, progress or (lambda size: None))
    named = {file.path.name: file for file in files.files}
    return _Fold(planned, view, streamed, reversible, named)


def _check_changed(changed: Mapping[str, Any], allow_unchanged: bool) -> None:
    """Refuse a fold that does nothing. PSG415."""
    if not allow_unchanged and not any(each["moved"] for each in changed.values()):
        message = "the fold changes no element of any weight"
        hint = "it is untrained, or too small for the dtype; --allow-unchanged writes it anyway"
        raise SurgeryError("PSG415", message, hint)


def _check_residuals(plan: FoldPlan, view: PlainView, reversible: bool) -> None:
    """Refuse residuals where more than the values of tensors changes. PSG416."""
    why = "is quantised and is written plain" if view.is_plain else None
    why = "has weights that were tied and are written apart" if plan.untied else why
    why = "gets another vocabulary" if plan.resized else why
    if reversible and why:
        message = f"'{view.folder}' {why}, which has no residual"
        raise SurgeryError("PSG416", message, "unfold from the base itself")


def _check(plan: FoldPlan, files: PlainView, adapter: TensorFile) -> None:
    """Refuse a plan whose tensors are not there, and an adapter that it leaves out. PSG416."""
    needed = {name for site in plan.sites for name in site.weights.values()} | plan.replaced.keys()
    for name in sorted(needed & plan.stacks.keys()):
        _check_stack(plan, name)
    needed = (needed - plan.stacks.keys()) | plan.pieces.keys()
    for name in sorted(needed):
        if name not in files.tensors:
            message = f"'{name}' is in no file of '{files.folder}'"
            raise SurgeryError("PSG416", message, files.why_unread(name))
        dtype = files.tensors[name][1].dtype
        if dtype not in FLOATS:
            message = f"'{name}' is kept in {dtype}, which cannot be added to"
            raise SurgeryError("PSG416", message, files.why_unread(name))
    for name in sorted(plan.consumed ^ adapter.tensors.keys()):
        where = "the fold does not use" if name in adapter.tensors else "the adapter does not hold"
        raise SurgeryError("PSG416", f"{where} '{name}'")


def _check_stack(plan: FoldPlan, name: str) -> None:
    """Refuse a stack that is no stack of experts that are folded each by itself. PSG416."""
    for site in plan.together(name):
        first = {0, None}.issuperset((site.rows or {"": 1}).values())
        if set(site.weights.values()) != {name} or not first or not is_by_rows(site, 3):
            why = f"'{name}' lies in pieces in the files, and '{site.adapter}' does not fold each"
            raise SurgeryError("PSG416", f"{why} expert by itself", IN_MEMORY)


def _hashes(view: PlainView) -> dict[str, str]:
    """The hashes of all tensors that a quantiser keeps, by which the base is known again."""
    found = {name: each for weight in view.coded.values() for name, each in weight.hashes.items()}
    return found | {name: hash_of(*view.files.tensors[name]) for name in view.aside}


def _other_files(
    plan: FoldPlan, view: PlainView, folded: Collection[TensorFile]
) -> dict[str, Iterable[bytes]]:
    """The blocks of the other files: those of the base, those of the plan, and the index.

    A base may hold files of any size that are none of its weights: they are read as they are
    written. An index says how many bytes all tensors have; where they are as many as before, it is
    kept.
    """
    files, left = view.files, {*plan.without, *(BESIDE if view.is_plain else ())}
    kept = other_files(files.folder).items()
    contents: dict[str, Iterable[bytes]] = {
        name: file_chunks(path) for name, path in kept if name not in left
    }
    values = {**plan.config, **plan.untied}
    if view.is_plain or values:
        contents[CONFIG] = [view.config(values)]
    if files.index is not None:
        contents[INDEX] = file_chunks(files.folder / INDEX)
        size = sum(tensor.size for file in folded for tensor in file.tensors.values())
        if view.is_plain or size != sum(tensor.size for _, tensor in files.tensors.values()):
            metadata = {**dict(files.index.get("metadata") or {}), "total_size": size}
            where = {name: file.path.name for file in folded for name in file.tensors}
            index = {**files.index, "metadata": metadata, "weight_map": dict(sorted(where.items()))}
            contents[INDEX] = [(json.dumps(index, indent=2) + "\n").encode()]
    return {**contents, **{name: [content] for name, content in plan.files.items()}}


def _is_whole(into: PartFolder, name: str) -> bool:
    """Whether a file was written by an earlier run and is still what its journal says."""
    said = into.done.get(name)
    return said is not None and is_as_said(into.path / name, said)
