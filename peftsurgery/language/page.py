"""Rule files as their pages say them, read without being checked.

The tests check every page that is shipped, and what a surgery has was checked when it was saved. So
whoever needs no more than what a page says reads it here: in a tenth of the time that
:func:`.loading.load_rules` takes, and without the schema, which takes longer to import than all the
rest of a short command.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import yaml

from peftsurgery.language.base import StandsOn, joined, laid_over
from peftsurgery.language.document import Document, read_document
from peftsurgery.language.evaluation import evaluate
from peftsurgery.language.expression import Expression, parse
from peftsurgery.language.file_formats import (
    MODULES,
    carried_settings,
    identifying_keys,
    key_suffixes,
    reserved_entry,
)
from peftsurgery.language.kinds import KINDS, Kind, pattern_kind
from peftsurgery.language.shipped import shipped

Said = Mapping[str, Any]


@dataclass(frozen=True)
class PageParam:
    """A parameter that a rule of a page adds."""

    shape: tuple[Expression, ...]


class PageRule:
    """One rule of a page; :class:`.schema.Rule` says what each part is."""

    def __init__(self, said: Said) -> None:
        """``said`` is what the page says of it."""
        self.said = said

    @cached_property
    def kind(self) -> Kind:
        """The names that the match binds."""
        match = self.said["match"]
        if isinstance(match, str):
            return KINDS[match]
        return pattern_kind(tuple(parse(match["pattern"]).names))

    @cached_property
    def let(self) -> dict[str, Expression]:
        """Names for intermediate values."""
        return _expressions(self.said.get("let", {}))

    @cached_property
    def params(self) -> dict[str, PageParam]:
        """What the rule adds at each site."""
        found: Said = self.said.get("params", {})
        return {name: PageParam(tuple(map(parse, of["shape"]))) for name, of in found.items()}

    @cached_property
    def fold(self) -> dict[str, Expression]:
        """The new values of weights by name; a text alone is that of W."""
        fold = self.said.get("fold", {})
        return _expressions(fold if isinstance(fold, Mapping) else {"W": fold})

    @property
    def is_plain(self) -> bool:
        """Whether the rule is for any settings, adds to other rules' cuts and stores nothing."""
        return not any(self.said.get(key) for key in ("when", "over", "store"))

    def applies(self, settings: Said) -> bool:
        """Whether the rule's ``when`` holds with these settings."""
        when = self.said.get("when")
        return when is None or bool(evaluate(parse(when), settings))

    def suffixes(self, format_name: str) -> dict[str, str]:
        """The key suffix of each parameter in a file format; none if the format has no form."""
        return key_suffixes(*self._table(format_name))

    def listing(self, format_name: str) -> str | None:
        """The config key of a file format that lists the modules of this rule."""
        return reserved_entry(*self._table(format_name), MODULES)

    def _table(self, format_name: str) -> tuple[Mapping[str, str], Collection[str]]:
        """What the rule says of a format, and the names of its parameters."""
        return self.said.get("checkpoint", {}).get(format_name, {}), self.said.get("params", {})


class Page:
    """A rule file as its page says it; :class:`.rule_file.RuleFile` says what each part is."""

    def __init__(self, said: Said) -> None:
        """``said`` is the whole page, laid over its bases'."""
        self.said = said
        self.name: str = said["name"]
        self.with_: Said = said.get("with", {})
        self.checkpoint: Mapping[str, Said] = said.get("checkpoint", {})
        self.rules = tuple(map(PageRule, said["rules"]))

    @staticmethod
    def of(text: bytes, source: str) -> Page:
        """Read a page that stands by itself.

        Raises what :func:`read_document` raises, and any error of Python's for what is no page.
        """
        said = read_document(text, source).data
        if "base" in said:
            raise ValueError(f"{source} stands on another file")
        return Page(said)

    @cached_property
    def let(self) -> dict[str, Expression]:
        """Numbers computed from the settings."""
        return _expressions(self.said.get("let", {}))

    @property
    def flat(self) -> str | None:
        """The name of the rules that the method is once it is trained, if others than these."""
        found: Said | None = self.said.get("flat")
        return None if found is None else found["rule"]

    def identifying(self, format_name: str) -> dict[str, Any]:
        """The config keys whose values identify this method in a file format."""
        return identifying_keys(self.checkpoint.get(format_name, {}), self.with_)

    def carried(self, format_name: str) -> dict[str, str]:
        """The config keys that carry a setting in a file format, and the setting's name."""
        return carried_settings(self.checkpoint.get(format_name, {}), self.with_)

    def changed(self, **said: Any) -> Page:
        """The same page where it says other things; what is None is said no more."""
        whole = {**self.said, **said}
        return Page({key: value for key, value in whole.items() if value is not None})

    def text(self) -> str:
        """The page as YAML text that reads as the same rules."""
        return yaml.safe_dump(_plain(self.said), sort_keys=False, allow_unicode=True, width=100)


@cache
def read_page(name: str) -> Page:
    """The page of a shipped rule file."""
    return Page(_whole(name).data)


@cache
def pages_with(word: str) -> tuple[str, ...]:
    """The names of the shipped pages in which a word is, or in one that they stand on.

    It is looked for in their text: most pages need not be read to know that.
    """
    texts = {name: path.read_text(encoding="utf-8") for name, path in shipped().items()}
    based = {name: text for name, text in texts.items() if re.search(r"^base:", text, re.MULTILINE)}
    found = {name for name, text in texts.items() if word in text}
    count = 0
    while count != len(found):
        count = len(found)
        found |= {n for n, text in based.items() if any(base in text for base in found)}
    return tuple(name for name in texts if name in found)


@cache
def _whole(name: str) -> Document:
    """The document of a page laid over its bases'; where what stands is not kept."""
    document = read_document(shipped()[name].read_bytes(), name)
    document = Document(document.data, {(): document.position(())})
    base = document.data.get("base")
    if base is None:
        return document
    names = [base] if isinstance(base, str) else base
    without, change = document.data.get("without", ()), document.data.get("change", ())
    said = StandsOn(
        names,
        document.data.get("where", {}),
        [change] if isinstance(change, Mapping) else change,
        [without] if isinstance(without, str) else without,
    )
    return laid_over(joined([_whole(each) for each in names], document), document, said)


def _expressions(said: Mapping[str, Any]) -> dict[str, Expression]:
    return {name: parse(text) for name, text in said.items()}


def _plain(value: Any) -> Any:
    """A value of a page without the positions of its texts."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
