"""``where``: the clauses that choose among the sites of a kind.

Several clauses in one mapping must all hold. ``all``, ``any`` and ``not`` combine mappings, and
``feeds`` / ``fed_by`` ask about the sites at the other end of the dataflow. A text of the form
``$setting`` stands for the setting's value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, StrictInt, ValidationError, WithJsonSchema

from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.language.position import position_of
from peftsurgery.language.strict import Strict, Word

_SETTING = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)")
_RANGE = re.compile(r"(\d{1,6})?(\.\.)?(\d{1,6})?")


def _as_tuple(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


def _as_layers(value: Any) -> Any:
    items = _as_tuple(value)
    for item in items:
        if not isinstance(item, str) or "$" not in item:
            layer_range(item)
    return items


def layer_range(item: Any) -> tuple[float, float]:
    """The first and last layer of ``3``, ``"4.."``, ``"..3"`` or ``"2..5"``, both included.

    PSG106 for anything else.
    """
    is_text = isinstance(item, int | str) and not isinstance(item, bool)
    match = _RANGE.fullmatch(str(item)) if is_text else None
    if match is None or not (match[1] or match[3]) or (match[3] and not match[2]):
        message = f"{item!r} is not a layer or a range of layers"
        hint = "write 3, '4..', '..3' or '2..5'"
        raise SurgeryError("PSG106", message, hint, position_of(item))
    first, dots, last = match.groups()
    low = float(first) if first else 0.0
    return low, (float(last) if last else float("inf") if dots else low)


_TEXT = {"type": "string"}
Names = Annotated[
    tuple[Word, ...],
    BeforeValidator(_as_tuple),
    WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}),
]
_LAYER = {"anyOf": [{"type": "integer"}, _TEXT]}
Layers = Annotated[
    tuple[int | Word, ...],
    BeforeValidator(_as_layers),
    WithJsonSchema({"anyOf": [*_LAYER["anyOf"], {"type": "array", "items": _LAYER}]}),
]
Fact = bool | int | float | str | None


class Where(Strict):
    """Clauses that a site must satisfy, all of them."""

    noun: ClassVar[str] = "where"

    role: Names | None = None
    """One of these roles; a * stands for any text (attn.*). An empty list leaves the rule out."""
    path: Word | None = None
    """A regular expression that the whole path of the module matches."""
    paths: Names | None = None
    """One of exactly these module paths; each of them must exist."""
    type: Names | None = None
    """The class name of the module that owns the site."""
    op: Names | None = None
    """The graph operation of the site: linear, addmm, ..."""
    kind: Names | None = None
    """The fact `kind`: self, cross or linear for attention and its projections, bias or weight for
    parameters."""
    after: Names | None = None
    """The fact `after`: the sublayer that a residual comes after."""
    tower: Names | None = None
    """What the site's input is made of: text, vision, audio, or connector between towers."""
    layers: Layers | None = None
    """Indices of the block in its list: 3, [0, 1], '4..', '..3', '2..5' (both ends included)."""
    block: Names | None = None
    """The path of the block that holds the site; a * stands for any text."""
    shape: tuple[StrictInt | None, ...] | None = None
    """The shape of the weight; null stands for any size."""
    dtype: Names | None = None
    """The dtype of the weight: float32, bfloat16, ..."""
    matched: Names | None = None
    """The module is one that an earlier adapter or rule file of one of these names cut."""
    facts: dict[Word, Fact] | None = None
    """Other facts of the site by name: {causal: true, heads: 12}."""
    all: tuple[Where, ...] | None = None
    """Every one of these holds."""
    any: tuple[Where, ...] | None = None
    """At least one of these holds."""
    not_: Where | None = Field(default=None, alias="not")
    """This does not hold."""
    feeds: Where | None = None
    """A site that this one's value reaches satisfies these clauses."""
    fed_by: Where | None = None
    """A site whose value reaches this one satisfies these clauses."""

    def bind(self, settings: Mapping[str, Any]) -> Where:
        """The same clauses with every ``$setting`` replaced by its value.

        A clause whose setting is null is left out.
        """
        return Where.model_validate(substitute(self, settings))

    def given(self) -> dict[str, Any]:
        """The clauses that were written, by their names in YAML."""
        fields = type(self).model_fields
        values = {f.alias or name: getattr(self, name) for name, f in fields.items()}
        return {name: value for name, value in values.items() if value is not None}

    def as_data(self) -> dict[str, Any]:
        """The clauses as JSON and YAML hold them."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)


EVERYWHERE = Where()
"""No clauses: every site satisfies them."""


def where_of(clauses: Any, argument: str) -> Where:
    """Clauses that were given in Python: a mapping, or a Where. PSG105 and PSG106 for no clauses.

    ``argument`` is what they were given as, which errors name.
    """
    try:
        return Where.model_validate(clauses)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(map(str, first["loc"]))
        raise SurgeryError("PSG106", f"{argument}: {path}: {first['msg']}") from None


def substitute(value: Any, settings: Mapping[str, Any]) -> Any:
    """The same value with every ``$setting`` in it replaced by what the setting is."""
    if isinstance(value, Where):
        clauses = substitute(value.given(), settings)
        return {key: clause for key, clause in clauses.items() if clause is not None}
    if isinstance(value, Mapping):
        new = {key: substitute(item, settings) for key, item in value.items()}
        return {key: new[key] for key in value if new[key] is not None or value[key] is None}
    if isinstance(value, list | tuple):
        items = [(substitute(item, settings), isinstance(item, str)) for item in value]
        kept = [(item, spread) for item, spread in items if not (spread and item is None)]
        if items and not kept:
            return None  # nothing but settings that are null
        return [part for item, spread in kept for part in _parts(item, spread)]
    if isinstance(value, str) and "$" in value:
        whole = _SETTING.fullmatch(value)
        if whole and whole[1] in settings:
            return settings[whole[1]]
        return _SETTING.sub(lambda m: str(settings.get(m[1], m[0])), value)
    return value


def _parts(item: Any, spread: bool) -> list[Any]:
    """A setting that holds a list stands for all of its items."""
    return list(item) if spread and isinstance(item, list | tuple) else [item]


def references(value: Any) -> list[str]:
    """The settings that a value refers to, as texts that know their position."""
    if isinstance(value, Where):
        value = value.given()
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [name for item in value for name in references(item)]
    return _SETTING.findall(value) if isinstance(value, str) else []


def check_references(value: Any, settings: Mapping[str, Any], key: str = "where") -> None:
    """Refuse a ``$name`` that is not a setting (PSG120)."""
    for name in references(value):
        if name not in settings:
            message = f"'${name}' in `{key}` is not a setting"
            raise SurgeryError("PSG120", message, did_you_mean(name, settings))
