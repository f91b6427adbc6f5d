"""``peftsurgery.json``: what was folded into which base, or exported from it, with which versions.

It is in the directory of a folded model; what was in the base already stays listed there. It is
beside an exported adapter if that is on another base than it was made for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from peftsurgery.capture.fingerprint import weights_of
from peftsurgery.capture.original_api import loaded_from
from peftsurgery.capture.sources import Source
from peftsurgery.errors import SurgeryError
from peftsurgery.files import read_object, remove
from peftsurgery.language.loading import dump_rules
from peftsurgery.places import object_in
from peftsurgery.surgery.model.made_with import now, versions
from peftsurgery.surgery.plan.cut import Operation

FILE, FORMAT = "peftsurgery.json", 1


def base_folder(source: Source) -> Path | None:
    """The directory that a base came from, read by us or before it was given to us."""
    loaded = loaded_from(source)
    given = Path(loaded) if loaded is not None and os.path.isdir(loaded) else None
    return source.folder or given


def folded_into(folder: Path | None) -> list[dict[str, Any]]:
    """What a model's directory says was folded into it; nothing for an ordinary one. PSG609."""
    if folder is None or not (folder / FILE).is_file():
        return []
    entries = read_object(folder / FILE, "PSG609").get("folded")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SurgeryError("PSG609", f"{folder / FILE} does not list what was folded")
    return entries


def fold_record(source: Source, operations: Iterable[Operation]) -> dict[str, Any]:
    """What the file says of a base that operations are folded into."""
    weights = weights_of(source)
    return {
        "format": FORMAT,
        "base": source.origin,
        "fingerprint": None if weights is None else weights.fingerprint.summary(),
        "folded": [*folded_into(base_folder(source)), *(_entry(source, op) for op in operations)],
        "versions": versions(),
        "date": now(),
    }


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
    return {
        "adapter": operation.name,
        "method": operation.file.name,
        "settings": operation.own_settings,
        **({"where": operation.where.as_data()} if operation.where.given() else {}),
        "rules": dump_rules(operation.file),
        "from": None if origin.folder is None else str(origin.folder),
        "content": origin.content,
        "seed": origin.seed,
        "other_base": origin.other_base,
        **({"build": build.to_dict()} if build else {}),
    }


def as_json(record: dict[str, Any]) -> bytes:
    """A record as its file holds it."""
    return (json.dumps(record, indent=2, default=str) + "\n").encode()
