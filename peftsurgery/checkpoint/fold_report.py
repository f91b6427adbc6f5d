"""What a fold wrote, on files or of a model in memory, as commands print it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class WrittenFile(Protocol):
    """A further file that a fold wrote."""

    def to_dict(self) -> dict[str, Any]:
        """The file as ``--json`` describes it."""

    def moved(self, path: str) -> WrittenFile:
        """The same file, in the place that it has in the end."""


@dataclass(frozen=True)
class FoldReport:
    """What a fold wrote: the account of each change by the weight's name, and how much it is.

    ``adapters`` are the names of what was folded, ``copied`` the base's other files that were taken
    over, ``verified`` is the largest difference of outputs from the operated model, None where they
    were not compared. Of a fold on files, ``written`` counts bytes, ``resumed`` are the files that
    an earlier run had written, and ``part`` is which part of the fold this tells of, where other
    parts are not written yet. Of one in memory, ``untied`` tells whether weights that were tied are
    written apart, ``error`` how far all of them are from exact ones, and ``onnx`` is the file.
    """

    out: str | Path
    changed: Mapping[str, Mapping[str, Any]]
    tensors: int
    written: int | None = None
    resumed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    verified: float | None = None
    part: str | None = None
    untied: bool = False
    error: Mapping[str, Any] | None = None
    onnx: WrittenFile | None = None

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
            "untied": self.untied,
            "requantised": survival(self.changed.values()) or None,
            "error": None if self.error is None else dict(self.error),
            "onnx": None if self.onnx is None else self.onnx.to_dict(),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        names = ", ".join(self.adapters) or "no adapter is active"
        moved = sum(each.get("moved", 1) > 0 for each in self.changed.values())
        lines = [f"{names}: changed {moved} of {self.tensors} tensors"]
        if self.adapters and not self.changed:
            what = "it is untrained, or too small"
            lines.append(f"  what was folded changes no weight at this precision: {what}")
        if self.changed:
            name = max(self.changed, key=lambda each: self.changed[each]["relative"] or 0.0)
            most = self.changed[name]
            lines.append(f"  most, by {most['relative'] or 0.0:.2%} of its norm: {name}")
        if self.error is not None and self.changed:
            size = f"{self.error['mean']:.1e} on average, {self.error['largest']:.1e} at most"
            lines.append(f"  written with an error of {size}")
        elif self.changed:
            worst = max(each["rounding"] for each in self.changed.values())
            lines.append(f"  largest rounding error: {worst:.1e}")
        again = survival(self.changed.values())
        if again:
            what = f"{again['survived']:.1%} of the change survived quantising again"
            lines.append(f"  {what}; what was lost is {again['lost']:.2f} of its norm")
        if self.untied:
            lines.append("  weights that were tied are written apart")
        if self.copied:
            lines.append(f"  taken over from the base: {', '.join(self.copied)}")
        if self.resumed:
            lines.append(f"  taken over from the run before: {', '.join(self.resumed)}")
        if self.verified is not None:
            lines.append(f"  reloaded and compared at two shapes: {self.verified:.1e} apart")
        if self.onnx is not None:
            lines.append(f"  {self.onnx}")
        lines += [f"note: {note}" for note in self.notes]
        where = f"folded model in {self.out}"
        if self.part is not None:
            where = f"part {self.part} of {self.out} is written; other parts are not"
        return "\n".join([*lines, where])


def survival(changes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What survived of all changes of weights that were quantised again, together.

    Nothing if there are none. ``survived`` is a share of the change, ``lost`` in parts of its norm.
    """
    mine = [each for each in changes if each.get("survived") is not None]
    squares = sum(each["norm"] ** 2 for each in mine)
    if not squares:
        return {}
    survived = sum(each["survived"] * each["norm"] ** 2 for each in mine) / squares
    lost = (sum(each["lost"] ** 2 for each in mine) / squares) ** 0.5
    return {"weights": len(mine), "survived": survived, "lost": lost}
