"""What a fold of files did, as commands print it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FoldReport:
    """What a streamed fold wrote: the certificate's account of each change, and how much it is.

    ``adapters`` are the names of what was folded, ``copied`` the base's other files that were taken
    over, ``resumed`` the files that an earlier run had written; ``verified`` is the largest
    difference of outputs from the operated model, None where they were not compared. ``part`` is
    which part of the fold this tells of, where other parts are not written yet.
    """

    out: Path
    changed: Mapping[str, Any]
    tensors: int
    written: int
    resumed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    verified: float | None = None
    part: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as ``--json`` prints it."""
        return {
            "out": str(self.out),
            "adapters": list(self.adapters),
            "changed": [{"name": name, **change} for name, change in self.changed.items()],
            "tensors": self.tensors,
            "written": self.written,
            "copied": list(self.copied),
            "resumed": list(self.resumed),
            "verified": self.verified,
            "part": self.part,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        names = ", ".join(self.adapters)
        lines = [f"{names}: changed {len(self.changed)} of {self.tensors} tensors"]
        if self.changed:
            name = max(self.changed, key=lambda each: self.changed[each]["relative"] or 0.0)
            most = self.changed[name]
            lines.append(f"  most, by {most['relative'] or 0.0:.2%} of its norm: {name}")
            worst = max(each["rounding"] for each in self.changed.values())
            lines.append(f"  largest rounding error: {worst:.1e}")
        if self.copied:
            lines.append(f"  taken over from the base: {', '.join(self.copied)}")
        if self.resumed:
            lines.append(f"  taken over from the run before: {', '.join(self.resumed)}")
        if self.verified is not None:
            lines.append(f"  reloaded and compared at two shapes: {self.verified:.1e} apart")
        lines += [f"note: {note}" for note in self.notes]
        where = f"folded model in {self.out}"
        if self.part is not None:
            where = f"part {self.part} of {self.out} is written; other parts are not"
        return "\n".join([*lines, where])
