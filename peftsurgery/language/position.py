"""Positions of values in rule files, for error messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Position:
    """Position in a source: its name, and line and column counted from 1."""

    source: str
    line: int = 1
    column: int = 1

    def shift(self, columns: int) -> Position:
        """The position ``columns`` characters to the right, on the same line."""
        return Position(self.source, self.line, self.column + columns)

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}"


class Text(str):
    """String that remembers the position it was read from.

    ``exact`` says that its characters stand one by one in the source from ``position`` on (a plain
    or simply quoted scalar of one line), so that an offset into the text is one on that line.
    """

    position: Position
    exact: bool

    def __new__(cls, value: str, position: Position, exact: bool = True) -> Text:
        """The string ``value``, read from ``position``."""
        text = super().__new__(cls, value)
        text.position, text.exact = position, exact
        return text

    def __reduce__(self) -> tuple[type[Text], tuple[str, Position, bool]]:
        return Text, (str(self), self.position, self.exact)

    def at(self, offset: int) -> Position:
        """Position of the character at ``offset``."""
        return self.position.shift(offset) if self.exact else self.position


def position_of(value: Any) -> str | None:
    """The position of a value that was read from a file."""
    return str(value.position) if isinstance(value, Text) else None
