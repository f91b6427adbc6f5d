"""Names of one model as they read in another, and names of equal blocks as one.

``model.layers.{0..11}.mlp`` stands for the twelve of them, ``{0..4,6..11}`` for all but one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import product

from peftsurgery.capture.names import is_within, join
from peftsurgery.diff.blocks import translated_path
from peftsurgery.diff.description import Node

_NUMBER = re.compile(r"(?<![^. ])\d+(?=[. ]|$)")

# For each number of a name, those that stand there; all their combinations are meant.
Box = tuple[tuple[int, ...], ...]


class Renaming:
    """What the modules and tensors of one model are called in another."""

    def __init__(self, blocks: Mapping[str, str], gone: Collection[str]) -> None:
        self.blocks, self.gone = blocks, gone
        self.modules: dict[str, str] = {}
        self.around: dict[str, str] = {}
        self.tensors: dict[str, str] = {}

    def learn(self, place: tuple[str, str], old: Node, new: Node) -> None:
        """Know from two nodes that are each other, in two blocks, what their modules are called."""
        one, other = (join(block, n.module) for block, n in zip(place, (old, new), strict=True))
        if old.op == new.op == "read":
            self.tensors.setdefault(one, other)
            one, other = one.rpartition(".")[0], other.rpartition(".")[0]
        self.modules.setdefault(one, other)
        while (one := one.rpartition(".")[0]) and (other := other.rpartition(".")[0]):
            self.around.setdefault(one, other)  # of a module without nodes of its own

    def path(self, path: str) -> str | None:
        """A module's path in the other model; None if its block is gone."""
        if any(is_within(path, block) for block in self.gone):
            return None
        known = self.modules.get(path, self.around.get(path))
        return translated_path(path, self.blocks) if known is None else known

    def tensor(self, name: str) -> str | None:
        """A tensor's name in the other model."""
        owner, _, leaf = name.rpartition(".")
        path = self.path(owner)
        if path is None:
            return None
        return self.tensors.get(name, join(path, leaf))

    def site(self, key: str) -> str | None:
        """The key of a site: its path, a space and the rest."""
        path, _, rest = key.partition(" ")
        here = self.tensors.get(path, self.path(path))
        return None if here is None else f"{here} {rest}"


def folded(names: Iterable[str]) -> list[tuple[str, int]]:
    """Names that differ in numbers only as one each, and how many it stands for."""
    groups: dict[str, list[tuple[int, ...]]] = {}
    for name in dict.fromkeys(names):
        numbers = tuple(int(number) for number in _NUMBER.findall(name))
        groups.setdefault(without_numbers(name), []).append(numbers)
    return [
        (_filled(pattern, part), _size(part))
        for pattern, several in groups.items()
        for part in _boxes(several)
    ]


def expanded(name: str) -> list[str]:
    """The names that a folded one stands for."""
    pieces = re.split(r"\{([\d.,]+)\}", name)
    columns = [_numbers(ranges) for ranges in pieces[1::2]]
    return [
        "".join(
            piece
            for pair in zip(pieces[::2], (*map(str, chosen), ""), strict=True)
            for piece in pair
        )
        for chosen in product(*columns)
    ]


def _numbers(ranges: str) -> list[int]:
    runs = (run.partition("..") for run in ranges.split(","))
    return [number for a, _, b in runs for number in range(int(a), int(b or a) + 1)]


def without_numbers(name: str) -> str:
    """A name with ``{}`` for each of its numbers."""
    return _NUMBER.sub("{}", name)


def _boxes(several: Sequence[tuple[int, ...]]) -> list[Box]:
    """The sets of numbers whose products the tuples are: one, or one for each first number."""
    columns = [tuple(sorted(set(column))) for column in zip(*several, strict=True)]
    if len(several) == len(list(product(*columns))):
        return [tuple(columns)]
    rest: dict[Box, list[int]] = {}
    groups: dict[int, list[tuple[int, ...]]] = {}
    for first, *others in several:
        groups.setdefault(first, []).append(tuple(others))
    for first, beneath in groups.items():
        for box in _boxes(beneath):
            rest.setdefault(box, []).append(first)
    return [(tuple(sorted(firsts)), *box) for box, firsts in rest.items()]


def _size(box: Box) -> int:
    return math.prod(len(column) for column in box)


def _filled(pattern: str, box: Box) -> str:
    for column in box:
        shown = str(column[0]) if len(column) == 1 else f"{{{span(column)}}}"
        pattern = pattern.replace("{}", shown, 1)
    return pattern


def span(numbers: Sequence[int]) -> str:
    """Sorted numbers as ranges: 0..4,6..11."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
