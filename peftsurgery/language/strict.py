"""The base of the schema's models: frozen, and closed against unknown keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.language.place import Text


def _as_word(value: Any) -> Any:
    if not isinstance(value, str):
        raise PydanticCustomError("text", "this must be a text")
    return value


Word = Annotated[str, PlainValidator(_as_word), WithJsonSchema({"type": "string"})]
"""A string that, unlike pydantic's, stays the :class:`Text` it was: it knows its place."""


class Strict(BaseModel):
    """A mapping of known keys. An unknown key is PSG105, at its place, with the nearest known."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        arbitrary_types_allowed=True,
        use_attribute_docstrings=True,
    )
    noun: ClassVar[str] = "mapping"

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for key in data:
            if key not in known and key not in cls.model_fields:
                where = str(key.place) if isinstance(key, Text) else None
                message = f"unknown key '{key}' in a {cls.noun}"
                raise SurgeryError("PSG105", message, did_you_mean(str(key), known), where)
        return data


def place_of(value: Any) -> str | None:
    """The place of a value that was read from a file."""
    return str(value.place) if isinstance(value, Text) else None


def complaint(error: ValidationError) -> tuple[tuple[str | int, ...], str]:
    """The first complaint of pydantic: where it is, and what it is in our manner."""
    first = error.errors(include_url=False)[0]
    path = tuple(step for step in first["loc"] if isinstance(step, str | int))
    message = first["msg"][:1].lower() + first["msg"][1:]
    missing = f" '{path[-1]}'" if first["type"] == "missing" else ""
    return path, f"{message}{missing}"
