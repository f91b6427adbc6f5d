"""What every format reads first: its table of words, the shipped methods it has, configs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from peftsurgery import files
from peftsurgery.errors import SurgeryError
from peftsurgery.language.loading import load_rules
from peftsurgery.language.rule_file import RuleFile
from peftsurgery.language.shipped import shipped


@cache
def words_of(table: Path) -> dict[str, Any]:
    """Load a library's word table, a YAML file."""
    found: dict[str, Any] = yaml.safe_load(table.read_text(encoding="utf-8"))
    return found


@cache
def forms(format_name: str) -> tuple[RuleFile, ...]:
    """The shipped rule files of methods that a format has too."""
    files = (load_rules(name) for name in shipped())
    return tuple(file for file in files if file.identifying(format_name))


def fits_setting(value: Any, default: Any, counts: bool) -> bool:
    """Whether a config's value can be that of a setting with this default.

    It is of the default's kind; numbers are not negative unless the default is, and what
    ``counts`` is at least 1.
    """
    if counts:
        return type(value) is int and value > 0
    if isinstance(default, int | float) and not isinstance(default, bool):
        return type(value) in (int, float) and min(default, 0) <= value < 2**63
    return isinstance(value, type(default))


def brief(value: Any) -> str:
    """A value of a config inside a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of an adapter's directory.

    PSG501 if it is missing, is no JSON object, holds a key twice, NaN or infinity.
    """
    if not (folder / name).is_file():
        raise SurgeryError("PSG501", files.absence(folder, name), nearby(folder, name))
    return files.read_object(folder / name, "PSG501")


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """A config as the libraries write it."""
    return (json.dumps(dict(config), indent=2, sort_keys=True) + "\n").encode()


def nearby(folder: Path, marker: str) -> str | None:
    """The adapters that lie one level deeper, which is where libraries put those with names."""
    if not folder.is_dir():
        return None
    inner = sorted(child.name for child in folder.iterdir() if (child / marker).is_file())
    return f"it holds adapters in {', '.join(inner[:5])}" if inner else None
