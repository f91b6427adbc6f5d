"""peft's words, from the table ``library.yaml``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftsurgery.formats.words import ShippedForm, shipped_forms, words_of
from peftsurgery.language.page import Page, read_page
from peftsurgery.language.said import SaidFile

if TYPE_CHECKING:
    from peftsurgery.language.rule_file import RuleFile

FORMAT, LIBRARY = "peft", "peft"


@dataclass(frozen=True)
class PeftTask:
    """A task: the name of transformers' list of its classes, and what their heads are called."""

    classes: str
    heads: Collection[str] = ()


@dataclass(frozen=True)
class Beside:
    """How an adapter of a method lies in the files of another; see ``library.yaml``."""

    method: str
    carries: str
    wrapper: str


@dataclass(frozen=True)
class WholeMethod:
    """What the config of a method without modules says of the model; see ``library.yaml``."""

    compared: Mapping[str, Any] = field(default_factory=dict)
    said: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PeftWords:
    """The table; see there what each part means."""

    patterns: Mapping[str, str]
    parts: Mapping[str, str]
    read: Collection[str]
    without_effect: Collection[str]
    beside: Mapping[str, Beside]
    without_parameters: Collection[str]
    choices: Mapping[str, Collection[Any]]
    absent: Mapping[str, Any]
    counts: Collection[str]
    tasks: Mapping[str, PeftTask]
    whole: Mapping[str, WholeMethod]


@cache
def peft_words() -> PeftWords:
    """The table, read once."""
    table = words_of(Path(__file__).with_name("library.yaml"))
    tasks = {name: PeftTask(**entry) for name, entry in table["tasks"].items()}
    whole = {name: WholeMethod(**entry) for name, entry in table["whole"].items()}
    beside = {key: Beside(**entry) for key, entry in table["beside"].items()}
    return PeftWords(**{**table, "tasks": tasks, "whole": whole, "beside": beside})


def flat_form(file: RuleFile) -> RuleFile:
    """The rules whose parameters peft saves, identified as the method itself."""
    if file.flat is None:
        return file
    from peftsurgery.language.loading import load_rules

    flat = load_rules(file.flat.rule)
    table = {**flat.checkpoint.get(FORMAT, {}), **file.identifying(FORMAT)}
    return flat.model_copy(update={"checkpoint": {**flat.checkpoint, FORMAT: table}})


def flat_page(page: Page) -> Page:
    """The page of the rules that :func:`flat_form` gives."""
    if page.flat is None:
        return page
    flat = read_page(page.flat)
    table = {**flat.checkpoint.get(FORMAT, {}), **page.identifying(FORMAT)}
    return flat.changed(checkpoint={**flat.checkpoint, FORMAT: table})


def known_names() -> set[str]:
    """Names that the shipped rules give a meaning: ends of tensors' names, whole ones after a /."""
    return {name for form in shipped_forms(FORMAT) for name in form.suffixes}


def forms_of(kind: str) -> list[ShippedForm]:
    """The forms of the shipped rule files that are of one of peft's methods."""
    return [f for f in shipped_forms(FORMAT, kind) if f.identifying["peft_type"] == kind]


def listings(files: Iterable[SaidFile]) -> set[str]:
    """The keys that list the modules of one of the rules, in these methods."""
    kinds = {file.identifying(FORMAT).get("peft_type") for file in files}
    alike = (form for kind in kinds if isinstance(kind, str) for form in forms_of(kind))
    return {key for form in alike for key in form.listings}
