"""Modes: the adapters that take part in a call, and the cuts that those make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from peftsurgery.language.where import layer_range
from peftsurgery.surgery.plan.cut import Cut


@dataclass(frozen=True)
class Mode:
    """The adapters that take part in a call, in the order they were applied.

    ``by_row`` says that each row of the batch uses one of them, or none; ``left_out`` are the
    layers, as in a rule's `where`, in which an adapter does nothing whenever it takes part;
    ``merged`` says that the adapters are in the weights, so that no cut is made.
    """

    names: tuple[str, ...] = ()
    by_row: bool = False
    left_out: tuple[tuple[str, tuple[int | str, ...]], ...] = ()
    merged: bool = False

    def takes_part(self, cut: Cut) -> bool:
        """Whether a cut is one of an active adapter's, and not in a layer left out."""
        name, layer = cut.operation.name, cut.placed.layer
        if name not in self.names or layer is None:
            return name in self.names
        ranges = map(layer_range, dict(self.left_out).get(name, ()))
        return not any(low <= layer <= high for low, high in ranges)

    @property
    def replacing(self) -> tuple[str, ...]:
        """The adapters whose copies of the base's parameters are read in the parameters' place.

        Where rows choose, every copy is read beside the base's own tensor.
        """
        return () if self.by_row else self.names


def mode_of(
    adapters: Iterable[str], names: Iterable[str], left_out: Mapping[str, tuple[int | str, ...]]
) -> Mode:
    """Mode in which these adapters take part, in the order they were applied.

    What is left out of the others goes along, for when they take part again.
    """
    every, chosen = tuple(adapters), set(names)
    active = tuple(name for name in every if name in chosen)
    return Mode(active, left_out=tuple((n, left_out[n]) for n in every if left_out.get(n)))
