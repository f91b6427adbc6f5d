"""The base of the schema's models: frozen, and closed against unknown keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.language.place import Text


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
