"""The base of the schema's models: frozen, and closed against unknown keys."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from itertools import pairwise
from textwrap import dedent
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.language.document import Document
from peftsurgery.language.position import Text


def _as_word(value: Any) -> Any:
    if not isinstance(value, str):
        raise PydanticCustomError("text", "this must be a text")
    return value


Word = Annotated[str, PlainValidator(_as_word), WithJsonSchema({"type": "string"})]
"""A string that, unlike pydantic's, stays the :class:`Text` it was: it knows its position."""


class Strict(BaseModel):
    """A mapping of known keys. An unknown key is PSG105, where it is, with the nearest known."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        arbitrary_types_allowed=True,
        defer_build=True,
    )
    noun: ClassVar[str] = "mapping"
    also: ClassVar[tuple[str, ...]] = ()
    """Keys that a file may have and that are gone by the time it gets here."""

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """The schema of this mapping, in which docstrings of attributes describe the keys.

        They are read from the source when a schema is asked for: each start would wait for it.
        """
        schema = handler(core_schema)
        keys = handler.resolve_ref_schema(schema)["properties"]
        for name, text in _docstrings(cls):
            if name in cls.model_fields:
                keys[cls.model_fields[name].alias or name]["description"] = text
        return schema

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = {*cls.also} | {field.alias or name for name, field in cls.model_fields.items()}
        for key in data:
            if key not in known and key not in cls.model_fields:
                where = str(key.position) if isinstance(key, Text) else None
                message = f"unknown key '{key}' in a {cls.noun}"
                raise SurgeryError("PSG105", message, did_you_mean(str(key), known), where)
        return data


def _docstrings(cls: type) -> Iterator[tuple[str, str]]:
    """The attributes of a class that have a docstring beneath them, and that."""
    (tree,) = ast.parse(dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    for statement, after in pairwise(tree.body):
        match statement, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                value=ast.Constant(value=str(t))
            ):
                yield name, inspect.cleandoc(t)


def refusal(error: ValidationError, document: Document) -> SurgeryError:
    """The first complaint of pydantic as a PSG106: the key, what it takes, and its position."""
    first = error.errors(include_url=False)[0]
    path = tuple(step for step in first["loc"] if isinstance(step, str | int))
    message = first["msg"][:1].lower() + first["msg"][1:]
    missing = f" '{path[-1]}'" if first["type"] == "missing" else ""
    known: tuple[str | int, ...] = ()
    for step in path:  # a union's branches appear in the path, but not in the document
        if (*known, step) in document.positions:
            known = (*known, step)
    name = "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in known).lstrip(".")
    where = str(document.position(known))
    return SurgeryError("PSG106", f"{name or 'the file'}: {message}{missing}", None, where)
