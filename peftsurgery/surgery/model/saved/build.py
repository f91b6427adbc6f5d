"""How a saved surgery says that its base is built otherwise than its files say.

surgery.json           build: the class, the labels, the vocabulary
base.safetensors       rows that the vocabulary has more, where they are known
tokenizer.json, ...    the tokenizer of that vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftsurgery.capture.builds import FACTS, FILES, Build
from peftsurgery.errors import SurgeryError
from peftsurgery.finite_tensors import as_safetensors, read_tensors
from peftsurgery.tokenizer_files import tokenizer_files

ROWS = "base.safetensors"
MOST = 2**24  # more tokens, or labels, than any model has


def own_tokenizer(build: Build) -> dict[str, bytes]:
    """The files of a build's own tokenizer, by their names; none if it is the base's."""
    return {} if build.tokenizer is None else tokenizer_files(build.tokenizer)


def build_contents(build: Build) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What a manifest says of a build, and the files that belong to it."""
    contents = own_tokenizer(build)
    if build.rows:
        contents[ROWS] = as_safetensors(build.rows)
    return ({"build": build.to_dict()} if build else {}), contents


def read_build(path: Path, manifest: Mapping[str, Any]) -> Build:
    """The build that a saved surgery is on. PSG605 if the manifest is damaged, PSG606 its rows."""
    said = manifest.get("build", {})
    if not isinstance(said, dict) or not all(_is_fact(*item) for item in said.items()):
        raise SurgeryError("PSG605", f"{path}: 'build' does not say how a base is built")
    if ("vocabulary" in said) != ("stored" in said):
        raise SurgeryError("PSG605", f"{path}: 'build' gives one vocabulary of two")
    rows = read_tensors(path / ROWS, "PSG606") if (path / ROWS).exists() else {}
    lacking = tuple(said.get("lacking", ()))
    has_tokenizer = bool(said) and (path / "tokenizer_config.json").is_file()
    build = Build(**{**said, "lacking": lacking}, rows=rows)
    return replace(build, tokenizer=path if has_tokenizer else None) if said else FILES


def _is_fact(name: str, value: Any) -> bool:
    if name not in FACTS:
        return False
    if name == "kind":
        return isinstance(value, str)
    if name == "lacking":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST
