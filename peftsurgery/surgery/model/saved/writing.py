"""Writing of surgeries: what is saved of a model, into which files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftsurgery import files
from peftsurgery.capture.fingerprint import weights_of
from peftsurgery.capture.sources import Source
from peftsurgery.checkpoint.model_plan import ModelPlan, with_hash
from peftsurgery.finite_tensors import as_safetensors
from peftsurgery.language.loading import dump_rules
from peftsurgery.made_with import now, versions
from peftsurgery.places import object_in
from peftsurgery.surgery.model.saved.build import ROWS, build_contents
from peftsurgery.surgery.model.saved.manifest import FORMAT, MANIFEST, RULES, TENSORS
from peftsurgery.surgery.plan.cut import Operation
from peftsurgery.tokenizer_files import tokenizer_files


@dataclass(frozen=True)
class Saved:
    """The adapters of a model, of which a surgery is to hold some.

    ``source`` is that of their base, ``left_out`` the layers in which they do nothing, ``lost`` the
    share that they lack of the changes they were combined of, ``trained`` the adapters by the
    base's parameters that they train; ``learnt`` is what those that are saved added and trained,
    ``moved`` the buffers that training moved, by their names in the model. ``fold`` is what their
    fold does to the base's parameters, where that can be said.
    """

    source: Source
    operations: Sequence[Operation]
    active: Sequence[str]
    left_out: Mapping[str, Sequence[int | str]]
    lost: Mapping[str, float]
    trained: Mapping[str, str]
    learnt: Mapping[str, torch.Tensor]
    moved: Mapping[str, torch.Tensor]
    fold: ModelPlan | None = None


def write_surgery(path: Path, names: Collection[str], saved: Saved) -> None:
    """Write the adapters of these names to ``path``, over the surgery that is there.

    PSG604 if something else is there.
    """
    operations = [operation for operation in saved.operations if operation.name in names]
    rules = {f"{RULES}/{n}_{op.file.name}.yaml": op for n, op in enumerate(operations)}
    entries = [_entry(operation, file, saved.lost) for file, operation in rules.items()]
    built, more = build_contents(saved.source.build)
    weights = weights_of(saved.source)
    said = {
        "trained": {name: owner for name, owner in saved.trained.items() if owner in names},
        "buffers": [*saved.moved],
        "left_out": {name: layers for name, layers in saved.left_out.items() if name in names},
    }
    manifest = {
        "format": FORMAT,
        "base": saved.source.origin,
        "model": type(saved.source.module).__name__,
        "operations": entries,
        "active": [name for name in saved.active if name in names],
        "versions": versions(),
        "seed": torch.initial_seed(),
        "date": now(),
        **built,
        **{key: value for key, value in said.items() if value},
        "fingerprint": None if weights is None else weights.fingerprint.to_dict(),
    }
    texts = {file: dump_rules(operation.file).encode() for file, operation in rules.items()}
    if saved.fold is not None:
        manifest["fold"] = with_hash(saved.fold.to_dict(), manifest, texts.values())
    contents = more | texts
    contents[TENSORS] = as_safetensors({**saved.learnt, **saved.moved})
    contents[MANIFEST] = json.dumps(manifest, indent=2).encode()
    older = _of_build(path)
    files.write_files(path, contents, MANIFEST, "PSG604", "a saved surgery")
    _remove_stale(path, older, [*rules, *contents])


def parts_of(path: Path) -> tuple[Path, ...]:
    """Where a surgery in a directory is written."""
    return path / MANIFEST, path / TENSORS, path / RULES


def is_updated(path: Path, operations: Iterable[Operation], names: Collection[str]) -> bool:
    """Whether ``path`` is a surgery that operations were read from, and all in it is saved again.

    So what was loaded, and trained further, goes back to its place; nothing there is lost.
    """
    folders = [op.origin.folder for op in operations if op.origin.folder is not None]
    if not os.path.isdir(path) or path.resolve() not in [folder.resolve() for folder in folders]:
        return False
    entries = object_in(path / MANIFEST).get("operations")
    held = [entry.get("name") for entry in entries] if isinstance(entries, list) else []
    return bool(held) and all(name in names for name in held)


def _of_build(path: Path) -> list[Path]:
    """The files in a saved surgery that are there for its build, if it has one."""
    has_build = bool(object_in(path / MANIFEST).get("build"))
    return [path / name for name in (ROWS, *(tokenizer_files(path) if has_build else ()))]


def _remove_stale(path: Path, older: Iterable[Path], named: Collection[str]) -> None:
    """Remove the files of an older surgery that the new one does not write. PSG603."""
    ours = [f for f in (path / RULES).glob("*.yaml") if re.fullmatch(r"\d+_.*", f.name)]
    stale = [f for f in (*ours, *older) if str(f.relative_to(path)) not in named]
    files.remove(stale)


def _entry(operation: Operation, rules: str, lost: Mapping[str, float]) -> dict[str, Any]:
    """An operation as a manifest lists it; ``rules`` is the name of its rule file."""
    entry = {"name": operation.name, "rules": rules, "settings": operation.own_settings}
    entry |= {"where": operation.where.as_data()} if operation.where.given() else {}
    origin = operation.origin
    said = {"seed": origin.seed, "other_base": origin.other_base, "lost": lost.get(operation.name)}
    return entry | {key: value for key, value in said.items() if value is not None}
