"""Plans of folds by what a saved surgery's manifest says of its sites: see ``model_plan``.

No model is built and no torch imported. Where the manifest says nothing of them, or the base is not
just what it was when the surgery was saved, there is no answer here: whoever captures the model
knows more, and refuses what is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftsurgery.checkpoint.card import files_beside
from peftsurgery.checkpoint.model_plan import ModelPlan, with_hash
from peftsurgery.checkpoint.plan import Planned
from peftsurgery.checkpoint.record import entry_of, folded_into, record_of
from peftsurgery.errors import SurgeryError
from peftsurgery.files import read_object
from peftsurgery.fingerprint import Fingerprint, content_digest, in_folder, on_disk
from peftsurgery.language.page import Page
from peftsurgery.language.settings import resolve_settings
from peftsurgery.model_files import are_here, read_model_files
from peftsurgery.tensor_file import TensorFile, read_header

MANIFEST, TENSORS = "surgery.json", "adapter.safetensors"

# What a manifest that is none runs into, wherever it is read: whoever captures refuses it by code.
_NONE = (AttributeError, KeyError, OSError, TypeError, ValueError)


def saved_plan(surgery: Path, base: str | None) -> Planned | None:
    """Plan the fold of a saved surgery by its manifest; None if that does not say all it takes.

    ``base`` is the directory of its base, if not the one that it names. Raises PSG416 for what
    cannot be folded on files, PSG207 and PSG606 for weights that cannot be read.
    """
    if not (surgery / MANIFEST).is_file():
        return None
    try:
        said = read_object(surgery / MANIFEST, "PSG605")
        made, prints = _plan_in(surgery, said), _prints(said, base or said["base"])
    except (SurgeryError, *_NONE):
        return None
    if made is None or prints is None:
        return None
    home, adapter = Path(base or said["base"]), read_header(surgery / TENSORS, "PSG606")
    try:
        entries = _entries(surgery, said, adapter)
    except (SurgeryError, *_NONE):
        return None
    files = read_model_files(home)
    plan = made.on(files)
    record = record_of(str(home), prints, entries)
    own, without = files_beside(surgery, home, record, made.library)
    plan = replace(plan, record=record, files=own, without=without)
    return Planned(plan, home, adapter)


def _plan_in(surgery: Path, said: Mapping[str, Any]) -> ModelPlan | None:
    """The plan in a manifest, if it is of the rules and settings that are there."""
    fold = said.get("fold")
    if fold is None or said.get("build") or said.get("buffers"):
        return None
    rules = [_inside(surgery, entry["rules"]).read_bytes() for entry in said["operations"]]
    moved = any(entry.get("other_base") for entry in said["operations"])
    if moved or fold["of"] != with_hash(fold, said, rules)["of"]:
        return None
    return ModelPlan.parse(fold)


def _prints(said: Mapping[str, Any], base: Any) -> Fingerprint | None:
    """The fingerprint of a base's files, if they are those that a manifest has on record."""
    recorded = Fingerprint.parse(said["fingerprint"])
    if recorded is None or not os.path.isdir(base) or not are_here(Path(base)):
        return None
    if folded_into(Path(base)):
        return None
    here = Fingerprint({name: each.print() for name, each in in_folder(Path(base)).items()})
    return here if here.tensors == recorded.tensors else None


def _entries(surgery: Path, said: Mapping[str, Any], adapter: TensorFile) -> list[dict[str, Any]]:
    """What the record lists of each operation, whose rules were checked when they were saved."""
    content = content_digest(on_disk(adapter, tensor) for tensor in adapter.tensors.values())
    found = []
    for entry in said["operations"]:
        page = Page.of(_inside(surgery, entry["rules"]).read_bytes(), entry["rules"])
        settings = resolve_settings(page, entry["settings"])
        own = {name: settings[name] for name in page.with_}
        told, where = (page.name, page.text(), own), dict(entry.get("where", {}))
        more = {"seed": entry.get("seed")}
        found.append(entry_of(entry["name"], *told, surgery, content, where, **more))
    return found


def _inside(surgery: Path, name: str) -> Path:
    """A file of a surgery. ValueError if it is elsewhere."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"'{name}' points out of '{surgery}'")
    return surgery / name
