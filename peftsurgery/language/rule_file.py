"""Rule files: a method's settings, its rules, and what its names must be for them to fit.

A file that stands on another (see :mod:`peftsurgery.language.base`) is whole by the time it gets
here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, PrivateAttr, model_validator

from peftsurgery.language.consistency import (
    MODEL_FACTS,
    check_expression,
    check_keys,
    check_rule,
    check_words,
)
from peftsurgery.language.expression import Expression, parse, within
from peftsurgery.language.file_formats import WITH, carried_settings, identifying_keys
from peftsurgery.language.on_base import OnBase
from peftsurgery.language.position import position_of
from peftsurgery.language.reserved import check_reachable
from peftsurgery.language.schema import ExpressionField, Flat, Rule, Setting
from peftsurgery.language.strict import Strict, Word
from peftsurgery.language.where import Where, check_references


class RuleFile(Strict):
    """A method: its settings and its rules."""

    noun: ClassVar[str] = "rule file"
    also: ClassVar[tuple[str, ...]] = ("base",)
    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")
    """The method's name; what it adds to the model is found under it."""
    about: str = ""
    """What the method is, and where it was published."""
    with_: dict[Word, Setting] = Field(default_factory=dict, alias="with")
    """The settings and their defaults; `--set name=value` overrides them."""
    let: dict[Word, ExpressionField] = Field(default_factory=dict)
    """Numbers computed from the settings."""
    roles: dict[Word, Where] = Field(default_factory=dict)
    """Roles of one's own, for this file: a name and the clauses that define it."""
    rules: tuple[Rule, ...] = Field(min_length=1)
    """The cuts, made in this order."""
    flat: Flat | None = None
    """What the method is once it is trained, if a network makes its parameters until then."""
    checkpoint: dict[Word, dict[Word, Setting | dict[Word, Setting]]] = Field(default_factory=dict)
    """For each file format: the config values that identify this method. A value that is the name
    of a setting carries that setting; under `with` are settings that every such file means, a text
    there being an expression over the number of `sites` and whether the model is `paired`, an
    encoder and a decoder."""

    _sources: tuple[Path, ...] = PrivateAttr(default=())

    @model_validator(mode="after")
    def _consistent(self) -> RuleFile:
        check_file(self)
        return self

    @property
    def sources(self) -> tuple[Path, ...]:
        """Files that it was read from, its own and its bases'; empty if made from text."""
        return self._sources

    def read_from(self, sources: Iterable[Path]) -> RuleFile:
        """The same rules, as read from files."""
        copied = self.model_copy()
        copied._sources = tuple(sources)
        return copied

    def identifying(self, format_name: str) -> dict[str, Any]:
        """The config keys whose values identify this method in a file format."""
        return identifying_keys(self.checkpoint.get(format_name, {}), self.with_)

    def implied(self, format_name: str) -> dict[str, Any]:
        """The settings that an adapter has in a file format whatever its config says.

        Those that depend on the model are expressions over `sites` and `paired`.
        """
        found: Any = self.checkpoint.get(format_name, {}).get(WITH, {})
        return {
            setting: parse(value, position_of(value)) if isinstance(value, str) else value
            for setting, value in found.items()
        }

    def carried(self, format_name: str) -> dict[str, str]:
        """The config keys that carry a setting in a file format, and the setting's name."""
        return carried_settings(self.checkpoint.get(format_name, {}), self.with_)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a rule file, whether it stands by itself or on another."""
    schema = RuleFile.model_json_schema(by_alias=True, mode="validation")
    schema["properties"] |= OnBase.model_json_schema()["properties"]
    schema["required"].remove("rules")
    schema["anyOf"] = [{"required": ["rules"]}, {"required": ["base"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def check_file(file: RuleFile) -> None:
    """Refuse a file whose names do not fit: PSG106, PSG113, PSG114 or PSG120."""
    check_words(file.with_, (), "setting")
    for setting in file.with_:
        check_reachable(setting)
    check_words(file.let, file.with_, "let")
    numbers: set[str] = set(file.with_)
    for name, expression in file.let.items():
        check_expression(expression, numbers)
        numbers.add(name)
    for where in (*file.roles.values(), *(rule.where for rule in file.rules)):
        check_references(where, file.with_)
    for expression in file.flat.settings.values() if file.flat is not None else ():
        check_expression(expression, numbers)
    for name in file.checkpoint:
        implied = file.implied(name)
        check_keys(implied, file.with_, f"`checkpoint: {name}` implies")
        for value in implied.values():
            if isinstance(value, Expression):
                check_expression(value, MODEL_FACTS)
    for rule in file.rules:
        check_references(rule.over, file.with_, "over")
        check_rule(rule, numbers)
        if file.flat is not None and rule.params:
            known = {*numbers, *rule.kind.sizes, *rule.params}
            for expression in file.flat.params.values():
                check_expression(expression, within(rule.let, known))
