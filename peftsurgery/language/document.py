"""YAML, read safely, with the position of every key and value.

Rule files come from strangers. The text is read as a stream of YAML events, so its depth is known
before anything recurses, and built into plain data by our own hands: duplicate keys, tags, anchors
and aliases are refused, and the scalars of YAML 1.1 that surprise people are not: ``1e-5`` is a
number here, ``on``, ``yes`` and ``12:30`` are texts, ``010`` is ten.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from peftsurgery.errors import SurgeryError, first_line
from peftsurgery.language.position import Position, Text

MAX_BYTES, MAX_LEVELS = 256 * 1024, 50

Path = tuple[str | int, ...]

QUICK = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, a tenth of the time

_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_INTEGER = re.compile(r"[-+]?[0-9]{1,30}")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class Document:
    """YAML document as plain data with positions: strings are :class:`Text`."""

    data: dict[str, Any]
    positions: dict[Path, Position]

    def position(self, path: Path) -> Position:
        """The position of the value at ``path``, or of the nearest thing around it."""
        while path not in self.positions:
            path = path[:-1]
        return self.positions[path]


@lru_cache(maxsize=64)  # several pages stand on one base
def read_document(text: str | bytes, source: str) -> Document:
    """Read one YAML mapping, or refuse it: PSG101 (syntax), 102 (size), 103 (duplicate), 104."""
    content = _decode(text, source)
    try:
        builder = _Builder(source)
        data = builder.build(yaml.parse(content, Loader=QUICK))
    except (yaml.YAMLError, ValueError):  # read again by the one whose errors say more
        data = None
    try:
        if data is None:
            builder = _Builder(source)
            data = builder.build(yaml.parse(content, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = builder.position(mark) if mark else Position(source)
        raise SurgeryError("PSG101", str(error.problem), error.context, str(position)) from None
    except yaml.YAMLError as error:
        raise SurgeryError("PSG101", first_line(error), where=source) from None
    if not isinstance(data, dict):
        message = "the file is empty" if data is None else "a rule file is a mapping of keys"
        raise SurgeryError("PSG102", message, "see `peftsurgery rules show lora_qv`", source)
    return Document(data, builder.positions)


def read_scalar(text: str) -> Any:
    """The value of a plain scalar: None, a bool, a number, or else the text itself."""
    lowered = text.lower() if text.lower() in _WORDS else text
    if lowered in _WORDS:
        return _WORDS[lowered]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text


def _decode(text: str | bytes, source: str) -> str:
    size = len(text) if isinstance(text, bytes) else len(text.encode(errors="surrogatepass"))
    if size > MAX_BYTES:
        message = f"{size} bytes are more than a rule file has ({MAX_BYTES})"
        raise SurgeryError("PSG102", message, where=source)
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        line = text[: error.start].count(b"\n") + 1
        message = f"not UTF-8: byte {text[error.start]:#04x}"
        raise SurgeryError("PSG102", message, where=f"{source}:{line}") from None


class _Builder:
    """Builds data from events, without recursion beyond the bounded depth."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.positions: dict[Path, Position] = {}

    def position(self, mark: Any) -> Position:
        return Position(self.source, mark.line + 1, mark.column + 1)

    def build(self, stream: Iterator[Event]) -> Any:
        self.stream, data, documents = stream, None, 0
        for event in stream:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self.refuse("PSG102", "a second document begins here", event)
            elif isinstance(event, NodeEvent):
                data = self.value(event, ())
        return data

    def value(self, event: Event, path: Path) -> Any:
        if len(path) > MAX_LEVELS:
            raise self.refuse("PSG102", f"nested more than {MAX_LEVELS} levels deep", event)
        self.positions[path] = self.position(event.start_mark)
        if isinstance(event, AliasEvent):
            raise self.refuse("PSG104", f"the alias *{event.anchor} is not allowed", event)
        if isinstance(event, NodeEvent) and event.anchor:
            raise self.refuse("PSG104", f"the anchor &{event.anchor} is not allowed", event)
        if getattr(event, "tag", None):
            raise self.refuse("PSG104", f"the tag {event.tag} is not allowed", event)
        if isinstance(event, MappingStartEvent):
            return self.mapping(path)
        if isinstance(event, SequenceStartEvent):
            return self.sequence(path)
        return self.scalar(event)

    def mapping(self, path: Path) -> dict[str, Any]:
        data: dict[str, Any] = {}
        while not isinstance(event := next(self.stream), MappingEndEvent):
            key = self.scalar(event) if isinstance(event, ScalarEvent) else None
            if not isinstance(key, str):
                raise self.refuse("PSG106", "a key must be a text; quote it", event)
            if key in data:
                first = self.positions[(*path, key)]
                hint = f"first given at line {first.line}"
                raise self.refuse("PSG103", f"'{key}' is given twice", event, hint)
            data[key] = None  # claims the key before its value is read
            data[key] = self.value(next(self.stream), (*path, key))
        return data

    def sequence(self, path: Path) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.stream), SequenceEndEvent):
            items.append(self.value(event, (*path, len(items))))
        return items

    def scalar(self, event: ScalarEvent) -> Any:
        if event.tag or event.anchor:
            raise self.refuse("PSG104", "tags and anchors are not allowed", event)
        value = read_scalar(event.value) if event.implicit[0] else event.value
        if isinstance(value, float) and value in (float("inf"), float("-inf")):
            raise self.refuse("PSG106", f"{event.value} is too large a number", event)
        if not isinstance(value, str):
            return value
        quoted = bool(event.style)
        start, end = event.start_mark, event.end_mark
        exact = end.index - start.index == len(value) + 2 * quoted and start.line == end.line
        return Text(value, self.position(start).shift(int(quoted)), exact)

    def refuse(
        self, code: str, message: str, event: Event, hint: str | None = None
    ) -> SurgeryError:
        return SurgeryError(code, message, hint, str(self.position(event.start_mark)))
