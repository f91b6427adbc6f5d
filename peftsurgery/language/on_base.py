"""What a file that stands on another says of its base, checked: see :mod:`.base`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, ValidationError, WithJsonSchema

from peftsurgery.language.base import KEYS, StandsOn
from peftsurgery.language.document import Document
from peftsurgery.language.strict import Strict, Word, refusal
from peftsurgery.language.where import Names

_MAPPING = {"type": "object", "additionalProperties": True}
_NULL = {"type": "null"}


class OnBase(Strict):
    """What only a file that stands on another says."""

    noun: ClassVar[str] = "rule file"
    base: Annotated[Names, Field(min_length=1)]
    """The rule file that this one stands on: a shipped name, or a path as seen from here; or a list
    of them, whose rules come one after another."""
    where: dict[Word, Any] = Field(default_factory=dict)
    """Clauses that are laid over those of every rule of the base."""
    change: Annotated[
        tuple[dict[Word, Any] | None, ...],
        BeforeValidator(lambda value: (value,) if isinstance(value, Mapping) else value),
        WithJsonSchema(
            {"anyOf": [{"type": "array", "items": {"anyOf": [_MAPPING, _NULL]}}, _MAPPING]}
        ),
    ] = ()
    """What is laid over the rules of the base, in order; null takes a rule out, and a mapping alone
    is for the first."""
    without: Names = ()
    """Settings of the base that its expressions read, and nothing here reads any more."""


def on_base(document: Document) -> StandsOn | None:
    """Read what a file says of its base; None if it stands by itself. Raises PSG106."""
    said = {key: value for key, value in document.data.items() if key in KEYS}
    if "base" not in said:
        return None
    try:
        found = OnBase.model_validate(said)
    except ValidationError as error:
        raise refusal(error, document) from None
    return StandsOn(found.base, found.where, found.change, found.without)
