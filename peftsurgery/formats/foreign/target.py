"""A module of a base, as far as an adapter of its weight has to know it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ForeignTarget:
    """A module that tensors are for: its path, its weight's shape, and how that lies.

    ``is_table`` is an embedding, ``is_turned`` a linear whose weight is (in, out).
    """

    path: str
    shape: tuple[int, ...]
    is_table: bool = False
    is_turned: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the change that two factors make: (out, in), and the taps of a kernel."""
        return self.shape[::-1] if self.is_table or self.is_turned else self.shape
