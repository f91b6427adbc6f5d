"""Plans of folds by the model's graph: which weight a site reads, which rows of it, how it lies.

No weights are needed for that: the base is captured on the meta device, of a quantised one a twin
that has its names and shapes as plain ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from peftsurgery.checkpoint.card import files_beside
from peftsurgery.checkpoint.codecs.coded import PlainView, plain_view
from peftsurgery.checkpoint.plan import FoldPlan, Planned
from peftsurgery.checkpoint.record import record_of
from peftsurgery.errors import SurgeryError
from peftsurgery.fingerprint import Fingerprint, on_disk
from peftsurgery.finite_tensors import as_safetensors
from peftsurgery.formats.plain_twin import plain_twin
from peftsurgery.formats.pretrained import open_adapter
from peftsurgery.formats.resized_tables import config_changes, name_of, new_rows, resized
from peftsurgery.model_files import ModelFiles, are_here, read_model_files
from peftsurgery.places import named_in
from peftsurgery.quiet import quiet
from peftsurgery.surgery.model.fold_record import fold_record
from peftsurgery.surgery.model.fold_sites import model_plan
from peftsurgery.surgery.model.operated import OperatedModel, active_operations
from peftsurgery.surgery.model.saved.manifest import is_surgery, read_manifest
from peftsurgery.tensor_file import read_header


def captured_plan(adapter: Path, base: str | None, allow_other_base: bool, room: Path) -> Planned:
    """Plan the fold of an adapter by capturing its base without weights.

    The adapter's tensors are written to the directory ``room``, by their names in the model.
    Raises what :func:`open_adapter` raises, and PSG416 for what cannot be folded on files.
    """
    coded = None if is_surgery(adapter) and not allow_other_base else _coded_base(adapter, base)
    named = base if coded is None else str(plain_twin(coded, room / "plain", adapter))
    with quiet():
        operated = open_adapter(adapter, named, allow_other_base)
    folder = operated.source.folder
    if folder is None:
        raise SurgeryError("PSG416", f"the base of '{adapter}' is no directory", "give its path")
    rows = new_rows(operated)
    plan = fold_plan(operated, read_model_files(folder), adapter, rows)
    if coded is not None:
        folder = coded.folder
        plan = _told_of(plan, coded, adapter)
    learnt = room / "adapter.safetensors"
    used = {key for _, key in plan.resized.values()}
    more = {name_of(name): value for name, value in rows.items() if name_of(name) in used}
    learnt.write_bytes(as_safetensors({**operated.learnt(*operated.active), **more}))
    return Planned(plan, folder, read_header(learnt))


def _coded_base(adapter: Path, base: str | None) -> PlainView | None:
    """The base of an adapter, if it is a directory of weights that a known codec keeps.

    PSG416 if it has others that its quantiser keeps.
    """
    named = base if base is not None else next(iter(named_in(adapter)), None)
    if named is None or not os.path.isdir(named) or not are_here(Path(named)):
        return None
    view = plain_view(read_model_files(Path(named)))
    why = view.why_unread()
    if why is not None:
        raise SurgeryError("PSG416", f"'{named}' is quantised as is not read: {why}")
    return view if view.coded else None


def _told_of(plan: FoldPlan, base: PlainView, adapter: Path) -> FoldPlan:
    """A plan that was made on a base's twin, with a record and a card that are of the base."""
    prints = {name: on_disk(*where).print() for name, where in base.held.items()}
    record = record_of(str(base.folder), Fingerprint(prints), plan.record["folded"])
    files, without = files_beside(adapter, base.folder, record, library=True)
    return replace(plan, record=record, files=files, without=without)


def fold_plan(
    model: OperatedModel, files: ModelFiles, adapter: Path, rows: Mapping[str, Tensor]
) -> FoldPlan:
    """Plan the fold of a model's active adapters into the files of its base.

    ``rows`` are the new ones of its vocabulary, by :func:`new_rows`.

    Raises PSG416 for what the files cannot be given: a base that was built otherwise than they say,
    weights kept in four bits, buffers that training moved, a tie that would be broken, a weight
    that is stored under no name that the model knows.
    """
    _check_plain(model, adapter)
    active = model.active
    made = model_plan(
        model.source.module, model.foldable(), model.trained, active, model.learnt(*active)
    )
    plan = made.on(files, resized(model, rows, files, made))
    record = fold_record(model.source, active_operations(model))
    own, without = files_beside(adapter, files.folder, record, made.library)
    said = config_changes(model)
    return replace(plan, record=record, files=own, without=without, config=said)


def _check_plain(model: OperatedModel, adapter: Path) -> None:
    """Refuse a base whose files are not the model that is folded. PSG416."""
    why = None
    if model.source.build.kind is not None or model.source.build.labels is not None:
        why = next(iter(model.source.build.notes), "the base is built otherwise than its files say")
    elif model.stored:
        why = f"'{min(model.stored)}' is kept in four bits, and the base's files hold it whole"
    elif is_surgery(adapter) and read_manifest(adapter).buffers:
        why = f"training moved the buffer '{read_manifest(adapter).buffers[0]}'"
    if why is not None:
        raise SurgeryError("PSG416", why, "fold in memory: fold_to_directory")
