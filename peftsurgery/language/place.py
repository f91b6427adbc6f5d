"""Positions of values in rule files, for error messages."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Place:
    """Position in a source: its name, and line and column counted from 1."""

    source: str
    line: int = 1
    column: int = 1

    def shift(self, columns: int) -> Place:
        """The position ``columns`` characters to the right, on the same line."""
        return replace(self, column=self.column + columns)

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}"


class Text(str):
    """String that remembers the position it was read from.

    ``exact`` says that its characters stand one by one in the source from ``place`` on (a plain or
    simply quoted scalar of one line), so that an offset into the text is an offset on that line.
    """

    place: Place
    exact: bool

    def __new__(cls, value: str, place: Place, exact: bool = True) -> Text:
        """The string ``value``, read from ``place``."""
        text = super().__new__(cls, value)
        text.place, text.exact = place, exact
        return text

    def __reduce__(self) -> tuple[type[Text], tuple[str, Place, bool]]:
        return Text, (str(self), self.place, self.exact)

    def at(self, offset: int) -> Place:
        """Position of the character at ``offset``."""
        return self.place.shift(offset) if self.exact else self.place
