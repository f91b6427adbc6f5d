"""Adapters' own copies of the base's parameters: what ``train: true`` trains.

    base   encoder.0.query.bias          frozen, shared with the base
    copy   encoder.0.query.bitfit.bias   the adapter's, trained

Programs read the base's name. While an adapter is active, its copy and the base's tensor change
places, so that the trained one has the name it has in the original and training code finds it
there; an adapter that is switched off gives the base its own tensor back.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..anatomy.site import join
from ..errors import SurgeryError


def home_of(parameter: str, adapter: str) -> str:
    """Where an adapter's copy of a parameter lives while the adapter is not active."""
    owner, _, leaf = parameter.rpartition(".")
    return join(join(owner, adapter), leaf)


@dataclass
class Copies:
    """The copies in one model: of which parameter, for which adapter, and which are in place."""

    made: dict[str, tuple[str, str]] = field(default_factory=dict)
    """By home: the parameter and the adapter."""
    placed: dict[str, str] = field(default_factory=dict)
    """By parameter: the home of the copy that has its place now."""

    def add(self, parameter: str, adapter: str) -> str:
        """Note a copy; its home is returned."""
        home = home_of(parameter, adapter)
        self.made[home] = (parameter, adapter)
        return home

    def name(self, home: str) -> str:
        """The name a copy has now: its parameter's, if it is in place."""
        parameter = self.made[home][0] if home in self.made else ""
        return parameter if self.placed.get(parameter) == home else home

    def base_name(self, parameter: str) -> str:
        """The name that the base's own tensor has now."""
        return self.placed.get(parameter, parameter)

    def check(self, active: Collection[str]) -> None:
        """Refuse two active adapters that replace one parameter. PSG312."""
        taken: dict[str, str] = {}
        for parameter, adapter in self.made.values():
            if adapter in active and taken.setdefault(parameter, adapter) != adapter:
                raise SurgeryError(
                    "PSG312",
                    f"'{taken[parameter]}' and '{adapter}' both train '{parameter}'",
                    f"deactivate one of them: deactivate('{taken[parameter]}')",
                )

    @property
    def adapters(self) -> frozenset[str]:
        """The adapters whose copies are in place."""
        return frozenset(self.made[home][1] for home in self.placed.values())

    def place(self, model: nn.Module, active: Collection[str]) -> None:
        """Put the copies of active adapters in place, and the base's tensors back elsewhere."""
        for parameter, home in list(self.placed.items()):
            if self.made[home][1] not in active:
                _exchange(model, parameter, self.placed.pop(parameter))
        for home, (parameter, adapter) in self.made.items():
            if adapter in active and parameter not in self.placed:
                self.placed[parameter] = home
                _exchange(model, parameter, home)

    def rename(self, state: dict[str, Tensor], prefix: str) -> None:
        """Give copies in a state dict the names they have now, whichever were in place before.

        A value under a parameter's own name is that of the one copy that the state has not under
        its home; if that is not one, it is left out, since it would change the base.
        """
        for parameter in dict.fromkeys(parameter for parameter, _ in self.made.values()):
            homes = [home for home, (owner, _) in self.made.items() if owner == parameter]
            found = {home: state.pop(prefix + home) for home in homes if prefix + home in state}
            lacking = [home for home in homes if home not in found]
            value = state.pop(prefix + parameter, None)
            if value is not None and len(lacking) == 1:
                found[lacking[0]] = value
            state.update({prefix + self.name(home): each for home, each in found.items()})


def _exchange(model: nn.Module, one: str, other: str) -> None:
    (here, first), (there, second) = _slot(model, one), _slot(model, other)
    here[first], there[second] = there[second], here[first]


def _slot(model: nn.Module, name: str) -> tuple[dict[str, nn.Parameter | None], str]:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner)._parameters, leaf
