"""``peftsurgery.json``: what was folded into which base, as the file says it.

It is in the directory of a folded model; what was in the base already stays listed there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peftsurgery.errors import SurgeryError
from peftsurgery.files import read_object
from peftsurgery.fingerprint import Fingerprint
from peftsurgery.made_with import now, versions
from peftsurgery.model_files import RECORD
from peftsurgery.stand_ins import called

FILE, FORMAT = RECORD, 1


def record_of(
    base: str | None, fingerprint: Fingerprint | None, folded: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the file says of a base that adapters are folded into; ``folded`` are their entries."""
    return {
        "format": FORMAT,
        "base": None if base is None else called(base),
        "fingerprint": None if fingerprint is None else fingerprint.summary(),
        "folded": [*folded],
        "versions": versions(),
        "date": now(),
    }


def entry_of(
    adapter: str,
    method: str,
    rules: str,
    settings: Mapping[str, Any],
    folder: Path | None,
    content: str | None,
    where: Mapping[str, Any] = MappingProxyType({}),
    **more: Any,
) -> dict[str, Any]:
    """One adapter's rules as the record lists them.

    ``rules`` is the text of the rule file of that ``method``, ``settings`` are those that it
    declares, ``folder`` and ``content`` where the adapter was read and the hash of its tensors,
    ``where`` the clauses that narrowed it.
    """
    return {
        "adapter": adapter,
        "method": method,
        "settings": dict(settings),
        **({"where": dict(where)} if where else {}),
        "rules": rules,
        "from": None if folder is None else called(folder),
        "content": content,
        "seed": None,
        "other_base": None,
        **more,
    }


def folded_into(folder: Path | None) -> list[dict[str, Any]]:
    """What a model's directory says was folded into it; nothing for an ordinary one. PSG609."""
    if folder is None or not (folder / FILE).is_file():
        return []
    entries = read_object(folder / FILE, "PSG609").get("folded")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SurgeryError("PSG609", f"{folder / FILE} does not list what was folded")
    return entries


def as_json(record: dict[str, Any]) -> bytes:
    """A record as its file holds it."""
    return (json.dumps(record, indent=2, default=str) + "\n").encode()
