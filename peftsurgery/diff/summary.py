"""Summary: what the outputs of a difference are made of, whatever their format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peftsurgery.diff.figures import Figures
from peftsurgery.diff.lines import Line
from peftsurgery.diff.weights import TensorChange

SCHEMA = "peftsurgery.diff/1"
PARTS = {
    "rule": "Rules",
    "algebra": "On random tensors",
    "config": "Config",
    "block": "Blocks",
    "insertion": "Adapters",
    "site": "Sites",
    "graph": "Operations",
    "tensor": "Parameters and buffers",
    "weight": "Weights",
}
_UNITS = ("", "k", "M", "G", "T", "P")


@dataclass(frozen=True)
class Summary:
    """A difference, ready to be shown: ``differs`` says of structure, config, weights whether.

    ``compared`` names all that was compared, if that is not the whole of both, and ``left_out``
    what was not.
    """

    names: tuple[str, str]
    figures: tuple[Figures, Figures] | None
    lines: Sequence[Line]
    differs: Mapping[str, bool]
    weights: Sequence[TensorChange] | None = None
    compared: str = ""
    left_out: str = ""

    def parts(self) -> Iterator[tuple[str, list[Line]]]:
        """The lines under the title of their part, in order; parts without a line are left out."""
        for part, title in PARTS.items():
            found = [line for line in self.lines if line.part == part]
            if found:
                yield title, found

    def notes(self) -> Iterator[str]:
        """Sentences below the changes: at which shape was counted, and what was not compared."""
        at = self.figures[0].at if self.figures else ""
        if self.lines and at:
            yield f"FLOPs and activations of one forward at {at}"
        if self.left_out:
            yield f"not compared: {self.left_out}"

    def headline(self) -> list[tuple[str, str, str, str]]:
        """(figure, of a, of b, difference) in words."""
        if self.figures is None:
            return []
        a, b = self.figures
        rows = [
            ("nodes", a.nodes, b.nodes, ""),
            ("parameters", a.parameters, b.parameters, ""),
            ("trainable", a.trainable, b.trainable, ""),
            ("size", a.bytes, b.bytes, "B"),
            ("FLOPs", a.flops, b.flops, ""),
            ("activations", a.activation_bytes, b.activation_bytes, "B"),
        ]
        made = [(row[0], *_shown(*row[1:])) for row in rows]
        one, other = (f"{100 * each.trainable / max(each.parameters, 1):.2f} %" for each in (a, b))
        return [*made[:3], ("trainable share", one, other, ""), *made[3:]]

    def sentence(self) -> str:
        """What differs, in one sentence."""
        parts = [part for part, differs in self.differs.items() if differs]
        of = f" of {self.compared}" if self.compared else ""
        if not parts:
            return f"no difference{of}"
        changes = len(self.lines)
        *most, last = parts
        which = f"{', '.join(most)} and {last}" if most else last
        return f"{which}{of}: {changes} change{'s' if changes != 1 else ''}"

    def to_dict(self) -> dict[str, Any]:
        """The JSON document; names are only added to it under one number of its schema.

        ``changes`` are the folded lines: ``part`` is a key of :data:`PARTS`, ``sign`` is one of
        ``+ - ~ >``, and ``where`` stands for ``count`` places. ``weights`` has every tensor with
        what :class:`peftsurgery.diff.tensor_change.Change` measures, and is null if they were not
        compared.
        """
        a, b = self.figures or (None, None)
        return {
            "schema": SCHEMA,
            "a": self.names[0],
            "b": self.names[1],
            "equal": not any(self.differs.values()),
            "differs": dict(self.differs),
            "compared": self.compared or None,
            "left_out": self.left_out or None,
            "headline": {"a": a and a.to_dict(), "b": b and b.to_dict()},
            "changes": [asdict(line) for line in self.lines],
            "weights": None if self.weights is None else [e.to_dict() for e in self.weights],
        }


def _shown(one: int | None, other: int | None, unit: str) -> tuple[str, str, str]:
    apart = "" if one is None or other is None else _apart(one, other)
    return amount(one, unit), amount(other, unit), apart


def _apart(one: int, other: int) -> str:
    if one == other:
        return "="
    share = f"{100 * (other - one) / one:+.2f} %" if one else "new"
    return "+0.00 %" if share == "-0.00 %" and other > one else share


def amount(value: int | None, unit: str = "") -> str:
    """A number with at most four digits and a unit: 1.235 M, 24 kB; ``-`` for None."""
    if value is None:
        return "-"
    scaled, step = float(value), 0
    while abs(scaled) >= 1000 and step < len(_UNITS) - 1:
        scaled, step = scaled / 1000, step + 1
    digits = f"{value}" if step == 0 else f"{scaled:.4g}"
    return f"{digits} {_UNITS[step]}{unit}".strip()
