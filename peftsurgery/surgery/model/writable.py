"""Where files made of a model may be written: nowhere that it was read from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftsurgery.capture import GraphModel
from peftsurgery.places import check_apart


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
