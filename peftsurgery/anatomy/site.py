"""Sites: what in a graph has a meaning, and the rows of a fused weight.

A :class:`Site` is found once per program and binds names to graph values; a :class:`Placed` is that
site in one block of one model. A :class:`Slice` says which rows of a fused weight are one of its
projections, and takes and puts them with views alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx

from peftsurgery.capture import Program
from peftsurgery.capture.names import join

ATEN = torch.ops.aten


@dataclass(frozen=True)
class Slice:
    """Rows of a fused weight: for g in range(groups), rows g*period+start ... of that length.

    ``groups * period`` is the number of rows of the whole. A contiguous run has one group. The
    methods take any value that ATen operators do (tensors, fake tensors, fx proxies), so the same
    slice cuts a weight, a bias, an activation and a graph.
    """

    start: int
    length: int
    period: int
    groups: int = 1

    def __post_init__(self) -> None:
        inside = self.start >= 0 and self.length >= 1 and self.start + self.length <= self.period
        if not inside or self.groups < 1:
            raise ValueError(f"{self} does not lie within its period")

    @property
    def rows(self) -> int:
        """How many rows the slice holds."""
        return self.length * self.groups

    @property
    def whole(self) -> int:
        """How many rows the fused weight has."""
        return self.period * self.groups

    def indices(self) -> list[int]:
        """The rows, in order."""
        starts = (g * self.period + self.start for g in range(self.groups))
        return [row for first in starts for row in range(first, first + self.length)]

    def take(self, value: Any, dim: int) -> Any:
        """The slice of ``value`` along ``dim``, which has ``whole`` entries: ``rows`` of them."""
        if self.groups == 1:
            return ATEN.slice.Tensor(value, dim, self.start, self.start + self.length)
        inner = self._inner(dim)
        split = ATEN.unflatten.int(value, dim, [self.groups, self.period])
        part = ATEN.slice.Tensor(split, inner, self.start, self.start + self.length)
        return ATEN.flatten.using_ints(part, *self._pair(dim))

    def put(self, value: Any, dim: int, new: Any) -> Any:
        """``value`` with the slice along ``dim`` replaced by ``new``, out of place."""
        if self.groups == 1:
            return self._join(value, dim, new)
        inner = self._inner(dim)
        split = ATEN.unflatten.int(value, dim, [self.groups, self.period])
        part = ATEN.unflatten.int(new, dim, [self.groups, self.length])
        return ATEN.flatten.using_ints(self._join(split, inner, part), *self._pair(dim))

    def _join(self, value: Any, dim: int, new: Any) -> Any:
        end = self.start + self.length
        pieces = [new]
        if self.start:
            pieces.insert(0, ATEN.slice.Tensor(value, dim, 0, self.start))
        if end < self.period:
            pieces.append(ATEN.slice.Tensor(value, dim, end, self.period))
        return ATEN.cat.default(pieces, dim) if len(pieces) > 1 else new

    @staticmethod
    def _inner(dim: int) -> int:
        """Where the period lies after unflattening ``dim`` into (groups, period)."""
        return dim if dim < 0 else dim + 1

    @staticmethod
    def _pair(dim: int) -> tuple[int, int]:
        """The two dims to flatten to undo the unflattening of ``dim``."""
        return (dim - 1, dim) if dim < 0 else (dim, dim + 1)


@dataclass(frozen=True, eq=False)
class Site:
    """What has a meaning in a program's graph.

    ``nodes`` binds the names a rule may use to graph values; see the module that finds each kind.
    ``facts`` holds sizes and properties, ``turned`` the names of what has its last two axes
    exchanged: of weights, (in, out). ``slice`` are the rows of its weights that are its own,
    ``taken`` those of its result, where one product makes the results of several sites: then
    ``whole`` is the site of that product. ``cores`` are the attention sites that a projection
    serves: two where two cores read one projection.
    """

    kind: str
    module: str
    role: str | None
    parameter: str | None
    nodes: Mapping[str, fx.Node]
    facts: Mapping[str, Any]
    slice: Slice | None = None
    taken: Slice | None = None
    turned: frozenset[str] = frozenset()
    label: str | None = None
    cores: tuple[Site, ...] = ()
    whole: Site | None = None

    def __repr__(self) -> str:
        part = f"[{self.label}]" if self.label else ""
        return f"<{self.kind} {self.parameter or self.module}{part} {self.role or '-'}>"


def features_dim(site: Site) -> int:
    """The axis of x and y that has a linear's features: in front of a convolution's places."""
    return 1 if "pointwise" in site.facts or site.kind == "conv" else -1


class Relations(Protocol):
    """Neighbour relation of sites: which feed which."""

    def feeds(self, placed: Placed) -> tuple[Placed, ...]:
        """Sites that read this site's output."""

    def fed_by(self, placed: Placed) -> tuple[Placed, ...]:
        """Sites whose outputs this site reads."""


@dataclass(frozen=True, eq=False)
class Placed:
    """A site in one block of a model, under its absolute names.

    ``layer`` is the block's index in its list (the outermost list, if lists are nested), ``type``
    the class of the module that owns the site, ``attentions`` the ids of the cores it belongs to,
    and ``program`` the one whose graph the site's nodes are in.
    """

    site: Site
    block: str
    program: Program
    layer: int | None = None
    type: str = ""
    attentions: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    relations: Relations | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        part = f"[{self.site.label}]" if self.site.label else ""
        return f"<{self.kind} {self.parameter or self.module}{part} {self.role or '-'}>"

    @property
    def kind(self) -> str:
        """The kind of site: linear, attention, embedding, residual, norm, parameter, conv."""
        return self.site.kind

    @property
    def role(self) -> str | None:
        """The site's part in the model; what only the callers of its block can tell comes first."""
        role: str | None = self.extra.get("role", self.site.role)
        return role

    @property
    def module(self) -> str:
        """The absolute path of the module."""
        return join(self.block, self.site.module)

    @property
    def parameter(self) -> str | None:
        """The absolute name of the weight."""
        name = self.site.parameter
        return None if name is None else join(self.block, name)

    @property
    def slice(self) -> Slice | None:
        """The rows of the weight, if it is fused with others."""
        return self.site.slice

    @property
    def facts(self) -> Mapping[str, Any]:
        """The site's facts, with those that depend on where the block is called."""
        return {**self.site.facts, **self.extra} if self.extra else self.site.facts

    @property
    def feeds(self) -> tuple[Placed, ...]:
        """Linears, cores, norms and residual sums of its block that read its output."""
        return () if self.relations is None else self.relations.feeds(self)

    @property
    def fed_by(self) -> tuple[Placed, ...]:
        """Sites of its block whose outputs it reads."""
        return () if self.relations is None else self.relations.fed_by(self)
