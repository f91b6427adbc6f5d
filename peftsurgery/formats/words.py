"""What every format reads first: its table of words, the shipped methods it has, configs."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from peftsurgery import files
from peftsurgery.errors import SurgeryError
from peftsurgery.language.document import QUICK
from peftsurgery.language.page import Page, pages_with, read_page

if TYPE_CHECKING:
    from peftsurgery.language.rule_file import RuleFile


@cache
def words_of(table: Path) -> dict[str, Any]:
    """Load a library's word table, a YAML file."""
    found: dict[str, Any] = yaml.load(table.read_text(encoding="utf-8"), Loader=QUICK)
    return found


@dataclass(frozen=True)
class ShippedForm:
    """A shipped rule file of a method that a format has too, as its page says it.

    ``identifying`` are the config keys whose values identify the method, ``suffixes`` the names
    that the format's tensors have, ``listings`` the config keys that list modules of a rule.
    """

    name: str
    identifying: Mapping[str, Any]
    suffixes: Collection[str]
    listings: Collection[str]

    @property
    def page(self) -> Page:
        """The rules as their page says them."""
        return read_page(self.name)

    @cached_property
    def file(self) -> RuleFile:
        """The rules themselves."""
        from peftsurgery.language.loading import load_rules

        return load_rules(self.name)


@cache
def shipped_forms(format_name: str, word: str = "") -> tuple[ShippedForm, ...]:
    """The shipped rule files of methods that a format has too; no rule of theirs is read yet.

    With a ``word``, such as the name of a method, only those on whose pages it is.
    """
    found = (_form(read_page(name), format_name) for name in pages_with(word))
    return tuple(form for form in found if form.identifying)


def forms(format_name: str) -> tuple[RuleFile, ...]:
    """The rules of :func:`shipped_forms`."""
    return tuple(form.file for form in shipped_forms(format_name))


def _form(page: Page, format_name: str) -> ShippedForm:
    suffixes = {each for rule in page.rules for each in rule.suffixes(format_name).values()}
    listings = {rule.listing(format_name) for rule in page.rules}
    listed = frozenset(each for each in listings if each is not None)
    return ShippedForm(page.name, page.identifying(format_name), frozenset(suffixes), listed)


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
