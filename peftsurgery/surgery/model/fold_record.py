"""``peftsurgery.json``: what was folded into which base, or exported from it, with which versions.

It is in the directory of a folded model; what was in the base already stays listed there. It is
beside an exported adapter if that is on another base than it was made for.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from peftsurgery.capture.fingerprint import weights_of
from peftsurgery.capture.original_api import loaded_from
from peftsurgery.capture.sources import Source
from peftsurgery.checkpoint.record import (
    FILE,
    FORMAT,
    as_json,
    entry_of,
    folded_into,
    record_of,
)
from peftsurgery.files import remove
from peftsurgery.language.loading import dump_rules
from peftsurgery.made_with import now, versions
from peftsurgery.places import object_in
from peftsurgery.surgery.plan.cut import Operation


def base_folder(source: Source) -> Path | None:
    """The directory that a base came from, read by us or before it was given to us."""
    loaded = loaded_from(source)
    given = Path(loaded) if loaded is not None and os.path.isdir(loaded) else None
    return source.folder or given


def fold_record(source: Source, operations: Iterable[Operation]) -> dict[str, Any]:
    """What the file says of a base that operations are folded into."""
    weights = weights_of(source)
    entries = [*folded_into(base_folder(source)), *(_entry(source, op) for op in operations)]
    return record_of(source.origin, None if weights is None else weights.fingerprint, entries)


def export_record(source: Source, operations: Collection[Operation]) -> dict[str, bytes]:
    """The file to write beside exported operations on a base that they were not made for.

    Nothing for others: the libraries that read them expect no such file.
    """
    if not any(operation.origin.other_base for operation in operations):
        return {}
    entries = [_entry(source, operation) for operation in operations]
    base = source.origin
    record = {"format": FORMAT, "base": base, "exported": entries, "versions": versions()}
    return {FILE: as_json({**record, "date": now()})}


def program_record(source: Source, operations: Iterable[Operation]) -> dict[str, Any]:
    """What a program's file says of the operations in it, which are not folded into the base."""
    entries = [_entry(source, operation) for operation in operations]
    return {**fold_record(source, ()), "exported": entries}


def clear_export_record(folder: Path, written: Collection[str]) -> None:
    """Remove what an earlier export into a directory said, if ``written`` has no record. PSG603."""
    file = folder / FILE
    if FILE not in written and "exported" in object_in(file):
        remove([file])


def _entry(source: Source, operation: Operation) -> dict[str, Any]:
    """One operation as the record lists it, with how its base was built, if not as its files say.

    Here and not beside the base: what is folded next is folded into an ordinary directory.
    """
    origin, build = operation.origin, source.build
    return entry_of(
        operation.name,
        operation.file.name,
        dump_rules(operation.file),
        operation.own_settings,
        origin.folder,
        origin.content,
        operation.where.as_data(),
        seed=origin.seed,
        other_base=origin.other_base,
        **({"build": build.to_dict()} if build else {}),
    )
