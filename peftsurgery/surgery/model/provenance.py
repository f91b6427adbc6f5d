"""Provenance: records of operations, and of what was folded into a model.

A folded model's directory has a file ``peftsurgery.json``, which says what was folded into which
base, and with which versions. What was in the base already stays listed there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftsurgery.capture import GraphModel
from peftsurgery.capture.fingerprint import weights_of
from peftsurgery.capture.original_api import loaded_from
from peftsurgery.capture.sources import Source
from peftsurgery.errors import SurgeryError
from peftsurgery.files import read_object, remove
from peftsurgery.language import dump_rules
from peftsurgery.places import check_apart, object_in
from peftsurgery.version import __version__

if TYPE_CHECKING:
    from peftsurgery.surgery.plan.cut import Operation

FILE, FORMAT = "peftsurgery.json", 1
_PACKAGES = ("torch", "transformers", "peftsurgery")


def now() -> str:
    """The time in UTC, in seconds; SOURCE_DATE_EPOCH instead, where a build is to be repeatable."""
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    moment = datetime.fromtimestamp(int(given), UTC) if given.isdecimal() else datetime.now(UTC)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def versions() -> dict[str, str]:
    """The versions of the packages that what is computed depends on."""
    return {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return __version__  # this package, run from a checkout


def check_places(model: GraphModel, *places: str | Path, updated: Path | None = None) -> None:
    """Refuse to write where something is that a model was made of. PSG602.

    That is its base, in a directory or in the hub's cache, and the surgeries, adapters and rule
    files that were put on it; but for ``updated``, the surgery that is written anew with all that
    it holds, unless the base is there.
    """
    read: list[Any] = list(model.read_from())
    if updated is not None:
        base = list(GraphModel.read_from(model))
        read = [*base, *(each for each in read if not _is_in(each, updated))]
    for place in places:
        check_apart(place, read)


def _is_in(name: str | Path | None, folder: Path) -> bool:
    return name is not None and folder.resolve() in (p := Path(name).resolve(), *p.parents)


def base_folder(source: Source) -> Path | None:
    """The directory that a base came from, read by us or before it was given to us."""
    loaded = loaded_from(source)
    given = Path(loaded) if loaded is not None and os.path.isdir(loaded) else None
    return source.folder or given


def operations_of(model: GraphModel) -> tuple[Operation, ...]:
    """What was done to a model; nothing, if it is as it was captured."""
    found: tuple[Operation, ...] = getattr(model, "operations", ())
    return found


def notes_of(operations: Iterable[Operation]) -> list[str]:
    """What a reader should know of where operations come from."""
    found = (note for operation in operations for note in operation.origin.notes)
    return list(dict.fromkeys(found))


def folded_into(folder: Path | None) -> list[dict[str, Any]]:
    """What a model's directory says was folded into it; nothing for an ordinary one. PSG609."""
    if folder is None or not (folder / FILE).is_file():
        return []
    entries = read_object(folder / FILE, "PSG609").get("folded")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SurgeryError("PSG609", f"{folder / FILE} does not list what was folded")
    return entries


def fold_record(model: GraphModel) -> dict[str, Any]:
    """What ``peftsurgery.json`` says of a model into which the active adapters are folded."""
    active = getattr(model, "active", ())
    source = model.source
    weights = weights_of(source)
    mine = [operation for operation in operations_of(model) if operation.name in active]
    return {
        "format": FORMAT,
        "base": source.origin,
        "fingerprint": None if weights is None else weights.fingerprint.summary(),
        "folded": [*folded_into(base_folder(source)), *(_entry(model, op) for op in mine)],
        "versions": versions(),
        "date": now(),
    }


def export_record(model: GraphModel, adapter: str) -> dict[str, bytes]:
    """The file to write beside an exported adapter that is on another base than it was made for.

    Nothing for others: the libraries that read them expect no such file.
    """
    mine = [operation for operation in operations_of(model) if operation.name == adapter]
    if not any(operation.origin.other_base for operation in mine):
        return {}
    entries = [_entry(model, operation) for operation in mine]
    base = model.source.origin
    record = {"format": FORMAT, "base": base, "exported": entries, "versions": versions()}
    return {FILE: as_json({**record, "date": now()})}


def clear_export_record(folder: Path, written: Collection[str]) -> None:
    """Remove what an earlier export into a directory said, if ``written`` has no record. PSG603."""
    file = folder / FILE
    if FILE not in written and "exported" in object_in(file):
        remove([file])


def _entry(model: GraphModel, operation: Operation) -> dict[str, Any]:
    """One operation as the record lists it, with how its base was built, if not as its files say.

    Here and not beside the base: what is folded next is folded into an ordinary directory.
    """
    origin, build = operation.origin, model.source.build
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
