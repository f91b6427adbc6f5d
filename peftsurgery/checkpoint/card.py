"""The card of a folded model: a short README.md with the front matter that the hub reads."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from peftsurgery.checkpoint.record import FILE
from peftsurgery.places import is_hub_id
from peftsurgery.tokenizer_files import is_tokenizer_file, tokenizer_files

CARD = "README.md"
_CACHED = re.compile(r"models--([\w.-]+?)(?:--([\w.-]+))?")


def files_beside(
    adapter: Path, base: Path, record: Mapping[str, Any], library: bool
) -> tuple[dict[str, bytes], frozenset[str]]:
    """The files that a fold writes beside the weights, and those of the base that it leaves out.

    The adapter's own tokenizer takes the place of the base's. A base without a card gets one if
    there is a ``record``; ``library`` tells whether it is a model of transformers.
    """
    own = tokenizer_files(adapter)
    names = [each.name for each in base.iterdir()] if own else []
    if record and not (base / CARD).exists():
        own = {**own, CARD: card_of(record, library).encode()}
    return own, frozenset(name for name in names if is_tokenizer_file(name))


def card_of(record: Mapping[str, Any], is_transformers: bool) -> str:
    """The card of a model, of which ``record`` says what was folded into it."""
    base = "" if record.get("base") is None else str(record["base"])
    named = hub_id(base)
    shown = named or Path(base).name
    matter: dict[str, Any] = {} if named is None else {"base_model": named}
    matter |= {"library_name": "transformers"} if is_transformers else {}
    matter["tags"] = ["peftsurgery"]
    title = f"{Path(shown).name}, folded" if shown else "A folded model"
    lines = [_line(entry) for entry in record["folded"]] or ["- no adapter"]
    head = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)
    what = f"The weights of `{shown}`" if shown else "The weights of a base"
    return "\n".join(
        [
            f"---\n{head}---\n",
            f"# {title}\n",
            f"{what}, with these adapters folded into them:\n",
            *lines,
            f"\n`{FILE}` has the rules, their settings and the versions in full.\n",
        ]
    )


def _line(entry: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key}={value}" for key, value in dict(entry["settings"]).items())
    other = entry.get("other_base")
    warning = "; **made for another base**" if other else ""
    return f"- `{entry['adapter']}`: {entry['method']}({settings}){warning}"


def hub_id(base: str) -> str | None:
    """A base's name on the hub: if it lies in the hub's cache, or is a name and no place here."""
    for part, inner in pairwise(Path(base).parts):
        found = _CACHED.fullmatch(part) if inner == "snapshots" else None
        if found:
            return "/".join(name for name in found.groups() if name)
    is_id = is_hub_id(base) and "--" not in base and not os.path.lexists(base)
    return base if is_id else None
