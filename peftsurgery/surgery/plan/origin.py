"""Origin of an operation, and how its base compares with the one it was made for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Origin:
    """Where an operation came from.

    ``folder`` is the directory it was read from, ``content`` a hash of the tensors there, ``seed``
    torch's seed when it was applied first. ``other_base`` says, if it was put on another base than
    it was made for, how that differs; ``notes`` what a reader of the report should know besides.
    """

    folder: Path | None = None
    content: str | None = None
    seed: int | None = None
    other_base: str | None = None
    notes: tuple[str, ...] = ()

    def read(self, found: Origin) -> Origin:
        """Merge a recorded origin with what was found on reading it now."""
        said = f"it was saved on another base than it was made for: {self.other_base}"
        return Origin(
            found.folder,
            found.content,
            self.seed,
            found.other_base or self.other_base,
            found.notes or (() if self.other_base is None else (said,)),
        )
