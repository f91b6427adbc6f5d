"""Models that share and freeze another's tensors; some are packed, some copied to train.

What is read by a name depends on the adapters that a call chooses: the base's own tensor, or the
copy of it that one of them trains. A packed weight has the name that the weight had.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peftsurgery.capture import GraphModel
from peftsurgery.capture.captures import Casts
from peftsurgery.capture.copying import SharedByCopies
from peftsurgery.capture.threads import making
from peftsurgery.surgery.fourbit.pack import PackedWeight
from peftsurgery.surgery.fourbit.store import PackedWeights
from peftsurgery.surgery.model.tensors import frozen, put, share
from peftsurgery.surgery.model.trained_copies import TrainedCopies
from peftsurgery.surgery.plan.cut import Operation
from peftsurgery.surgery.plan.plan import Plan


class SharedModel(GraphModel):
    """Captured model over its base's tensors: shared and frozen, packed or copied by plan."""

    def __init__(self, model: GraphModel, plan: Plan) -> None:
        """Share the tensors that ``model`` has now, and keep packed what the plan stores.

        What ``model`` itself trained of the base is not the base's, and is not shared.
        """
        before = model if isinstance(model, SharedModel) else None
        self._plan, self._base = plan, _Base(unoperated(model))
        self._copies = TrainedCopies.of(plan.cuts)
        self._packed: PackedWeights = PackedWeights(None if before is None else before._packed)
        super().__init__(model._captures, frozen)
        names = str if before is None else before._copies.base_name
        share(self, model, self._captures.tensors, names)
        self._bound = model._bound
        with making():
            self._pack()

    @property
    def base(self) -> GraphModel:
        """The captured model that the operations are on."""
        return self._base.model

    @property
    def stored(self) -> Mapping[str, PackedWeight]:
        """The base's weights that the model keeps packed, whichever adapters are active."""
        return self._packed.weights

    def base_name(self, name: str) -> str:
        """The current name of a tensor of the base: a copy that is trained may have its own."""
        return self._copies.base_name(name)

    def own_name(self, name: str) -> str:
        """The current name of what an adapter added or trains, by the name it has in all models."""
        return self._copies.name(name)

    def take_names(self, state: dict[str, Tensor], adapters: Collection[str]) -> None:
        """Give copies in ``state``, of these adapters, the names that they have here."""
        self._copies.rename(state, "", adapters)

    def _pack(self) -> None:
        """Keep packed what the plan stores, and dense what only the model before had packed."""
        infos, base = self._captures.tensors, self.base
        for name in self._packed.settle(self._plan.cuts, infos, self.get_parameter):
            self._replace(name, base.get_parameter(name))
            self._bound = self._bound and base._bound
        self._packed.pack(self.get_parameter, self._replace)

    def _replace(self, name: str, value: Tensor) -> None:
        """Replace a parameter's tensor under all of its names."""
        put(self, (name, *self._unread(name)), value)

    def _unread(self, name: str) -> list[str]:
        """Aliases of a tied parameter that no program reads; they follow its replacements."""
        return [alias for alias in self._captures.names[name] if alias not in self._plan.read]

    def _read(self, active: Collection[str], name: str) -> Tensor:
        """Tensor that a call reads under a name with these adapters active, unpacked."""
        read = self._copies.read(name, active)
        return self._packed.dense(name, self.tensor(read))

    def tensor(self, name: str) -> Tensor:
        """A parameter or a buffer, by its name."""
        owner, _, leaf = name.rpartition(".")
        held: Tensor = getattr(self.get_submodule(owner), leaf)
        return held

    def _read_weights(self) -> None:
        """Read the base's weights, and copy those that rules train."""
        with self._copies.all_at_home(self):
            self._read_base()
            self._copies.fill(self)

    def _bind_base(self) -> None:
        """Read the base's weights, before there are copies of them."""
        if not self._bound:
            self._read_base()
            self._bound = True

    def _read_base(self) -> None:
        super()._read_weights()
        if self._packed.weights:
            self._packed.pack(self.get_parameter, self._replace)
            self.source.release()

    def _fill(self) -> None:
        """Read the base's weights if rules train some of them, and there are any to read."""
        copies = (self.get_parameter(self._copies.name(home)) for home in self._copies.made)
        if self.source.is_readable and any(copy.is_meta for copy in copies):
            self.bind()

    def _names_of_base(self) -> frozenset[str]:
        """Current names of the base's own tensors."""
        return frozenset(map(self._copies.base_name, self._captures.tensors))

    def _casts(self) -> Casts:
        return super()._casts() | self._packed.casts(self._captures.tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._packed.cast(fn)
        return super()._apply(fn, recurse)


@dataclass(frozen=True)
class _Base(SharedByCopies):
    """Holds the base without making it a part of the model."""

    model: GraphModel


def operations_of(model: GraphModel) -> tuple[Operation, ...]:
    """What was done to a model; nothing, if it is as it was captured."""
    return model._plan.operations if isinstance(model, SharedModel) else ()


def unoperated(model: GraphModel) -> GraphModel:
    """The captured model beneath an operated one; a captured model itself."""
    return model.base if isinstance(model, SharedModel) else model
