"""module_tree: a model's modules with their changes as a tree, alike neighbours as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from peftsurgery.diff.description import Description, TensorFacts
from peftsurgery.diff.lines import Line
from peftsurgery.diff.names import expanded


@dataclass
class ModuleEntry:
    """A module: ``lines`` are the changes at it, ``beneath`` counts those in its parts.

    ``count`` equal neighbours are one part, named ``0..11``.
    """

    name: str
    size: str = ""
    count: int = 1
    lines: list[Line] = field(default_factory=list)
    parts: list[ModuleEntry] = field(default_factory=list)

    @property
    def beneath(self) -> int:
        """How many changes the parts have."""
        return sum(len(part.lines) + part.beneath for part in self.parts)

    @property
    def look(self) -> tuple[object, ...]:
        """What two parts have in common that are shown as one: all but the name."""
        inner = tuple((part.name, part.look) for part in self.parts)
        return self.size, tuple(id(line) for line in self.lines), inner


def module_tree(description: Description, lines: Sequence[Line]) -> ModuleEntry:
    """The modules that have tensors or changes."""
    top = ModuleEntry(description.kind)
    known: dict[str, ModuleEntry] = {"": top}
    for name, tensor in description.tensors.items():
        _at(known, name).size = _size(tensor)
    for line in lines:
        if line.part != "config":
            for name in expanded(line.where):
                _at(known, name).lines.append(line)
    _merge(top)
    return top


def _at(known: dict[str, ModuleEntry], path: str) -> ModuleEntry:
    if path not in known:
        owner, _, leaf = path.rpartition(".")
        known[path] = ModuleEntry(leaf)
        _at(known, owner).parts.append(known[path])
    return known[path]


def _size(tensor: TensorFacts) -> str:
    return f"{tensor}{'' if tensor.trained else ' frozen'}"


def _merge(part: ModuleEntry) -> None:
    """Make one of neighbours that differ by their number alone."""
    merged: list[ModuleEntry] = []
    firsts: list[str] = []
    for inner in part.parts:
        _merge(inner)
        same = merged and inner.name.isdigit() and merged[-1].look == inner.look
        if same:
            merged[-1].count += 1
            merged[-1].name = f"{firsts[-1]}..{inner.name}"
        else:
            merged.append(inner)
            firsts.append(inner.name)
    part.parts = merged
