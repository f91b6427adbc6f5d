"""Plans of folds: what to do with which tensor of a checkpoint, as plain data.

A plan is made where the model's graph is known, and carried out where only files are: it says of
each site which tensors of the base are its weights and which of the adapter its parameters, how the
weights lie in memory, and the rule's own text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from peftsurgery.language.expression import Expression
from peftsurgery.tensor_file import TensorFile

# A tensor's name, its expert, and its rows from one to another, the last one not included.
Piece = tuple[str, int, int, int]


@dataclass(frozen=True)
class SiteFold:
    """The fold of one rule at one site.

    ``weights`` and ``parameters`` are names of tensors in the base and in the adapter, by the
    rule's names for them; ``absent`` are weights that the site has none of. ``turned`` weights are
    stored as (in, out). ``axes`` has (order, shape) of weights that are stored under other axes:
    in that order, and put together, they are a matrix of that shape. ``slice`` is (start, length,
    period, groups): which rows of a fused weight are the site's. ``rows`` has the axes of
    parameters that go with the rows of the weights, if the rule folds each row by itself; None if
    it does not. ``lines`` has the same of the lines in which matrices are stored, where these are
    not the rows: the columns of turned ones, and the lines of each matrix in a stack.
    """

    adapter: str
    module: str
    weights: Mapping[str, str]
    parameters: Mapping[str, str]
    numbers: Mapping[str, Any]
    fold: Mapping[str, Expression]
    let: Mapping[str, Expression]
    absent: tuple[str, ...] = ()
    turned: frozenset[str] = frozenset()
    axes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    slice: tuple[int, int, int, int] | None = None
    rows: Mapping[str, int] | None = None
    lines: Mapping[str, int] | None = None

    @cached_property
    def needed(self) -> set[str]:
        """Names of the base's tensors that the fold reads or changes."""
        read = {name for each in (*self.fold.values(), *self.let.values()) for name in each.names}
        return {self.weights[name] for name in self.weights.keys() & (read | self.fold.keys())}

    @property
    def changed(self) -> list[str]:
        """Names of the base's tensors that this changes."""
        return [self.weights[name] for name in self.fold if name in self.weights]


@dataclass(frozen=True)
class FoldPlan:
    """All that a fold does to a checkpoint.

    ``sites`` are in the order in which they are folded; ``replaced`` tensors become the adapter's
    of the given name. ``record`` says what is folded into what. ``files`` are written instead of
    the base's of their names, and those in ``without`` are left behind.

    ``ties`` has the names of tensors that are one with another, by whose name the files have them.
    Where they become unlike, each is written, and config.json says what is in ``untied``, by dotted
    paths. What it says in any case is in ``config``. ``resized`` tensors get another number of
    rows; what follows those of the base is the adapter's tensor of the given name, or zeros that
    are replaced. ``stacks`` are weights (experts, rows, columns) that the files hold in pieces.
    """

    sites: tuple[SiteFold, ...]
    replaced: Mapping[str, str] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    without: frozenset[str] = frozenset()
    ties: Mapping[str, str] = field(default_factory=dict)
    untied: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    resized: Mapping[str, tuple[int, str | None]] = field(default_factory=dict)
    stacks: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)

    @cached_property
    def changed(self) -> set[str]:
        """Names of the tensors that are written otherwise than the base has them."""
        mine = (name for site in self.sites for name in site.changed)
        names = {*self.replaced, *self.resized, *mine}
        parts = (piece for name in names & self.stacks.keys() for piece, *_ in self.stacks[name])
        return {*(names - self.stacks.keys()), *parts}

    @cached_property
    def pieces(self) -> dict[str, tuple[str, int, int, int]]:
        """The stack that a tensor is a piece of, its expert, and its rows from one to another."""
        return {
            piece: (name, expert, start, end)
            for name, pieces in self.stacks.items()
            for piece, expert, start, end in pieces
        }

    @property
    def consumed(self) -> set[str]:
        """Names of the adapter's tensors that the fold reads."""
        rows = (key for _, key in self.resized.values() if key is not None)
        mine = (name for site in self.sites for name in site.parameters.values())
        return {*self.replaced.values(), *rows, *mine}

    def together(self, name: str) -> list[SiteFold]:
        """The folds that a tensor's new value takes: its own, and those of weights beside it."""
        names, count = {name}, 0
        while count != len(names):
            count = len(names)
            mine = [site for site in self.sites if not names.isdisjoint(site.needed)]
            names |= {weight for site in mine for weight in site.needed}
        return mine


@dataclass(frozen=True)
class Planned:
    """A plan with what it is carried out on: the base's directory, and the adapter's tensors."""

    plan: FoldPlan
    base: Path
    adapter: TensorFile


def without_repeats(sites: Iterable[SiteFold]) -> Iterator[SiteFold]:
    """Leave out a fold that is there already: of a layer that is called twice."""
    seen = set[Any]()
    for site in sites:
        key = (site.adapter, *site.weights.items(), site.slice, *site.parameters.items())
        if key not in seen:
            seen.add(key)
            yield site
