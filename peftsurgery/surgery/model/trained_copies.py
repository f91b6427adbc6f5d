"""Trained copies of base parameters, one for each adapter with ``train: true``.

    encoder.0.query.bias          one adapter's copy, trained, under the name that training knows
    encoder.0.query.bitfit.bias   the base's own tensor, frozen and shared with the base
    encoder.0.query.other.bias    another adapter's copy

Which tensor a call reads depends on the adapters that it chooses, so its programs read each by the
name that it has, and names are given once. The copy of the adapter that was applied first has the
parameter's own name, whether it is active or not. A copy's *home* is its name
otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peftsurgery.capture.tensors import owner_of
from peftsurgery.errors import SurgeryError
from peftsurgery.surgery.plan.cut import Cut, copy_name


@dataclass
class TrainedCopies:
    """The copies in one model: of which parameter, for which adapter, and which have its name."""

    made: dict[str, tuple[str, str]]
    """By home: the parameter and the adapter."""
    first: dict[str, str] = field(default_factory=dict)
    """By parameter: the home of the copy that has its name; the base's own tensor has the home."""

    @classmethod
    def of(cls, cuts: Iterable[Cut]) -> TrainedCopies:
        """The copies that cuts need, all of them at home."""
        found = [(c.placed.parameter, c.operation.name) for c in cuts if c.rule.train]
        return cls({copy_name(name, adapter): (name, adapter) for name, adapter in found if name})

    def name(self, home: str) -> str:
        """The name that a copy has: its parameter's if it is the first."""
        parameter = self.made[home][0] if home in self.made else ""
        return parameter if self.first.get(parameter) == home else home

    def base_name(self, parameter: str) -> str:
        """The name that the base's own tensor has."""
        return self.first.get(parameter, parameter)

    def read(self, parameter: str, active: Collection[str]) -> str:
        """The name of the tensor that a call reads for a parameter, if these are active."""
        for adapter in active:
            home = copy_name(parameter, adapter)
            if home in self.made:
                return self.name(home)
        return self.base_name(parameter)

    def moved(self, active: Collection[str], by_row: bool) -> dict[str, str]:
        """The names that programs read otherwise than they say.

        They say the parameter's for what is chosen or, by row, for the base's, and homes for
        copies.
        """
        parameters = dict.fromkeys(parameter for parameter, _ in self.made.values())
        homes = self.made if by_row else ()
        names = {name: self.read(name, active) for name in parameters}
        names |= {home: self.name(home) for home in homes}
        return {name: now for name, now in names.items() if now != name}

    def owners(self) -> dict[str, str]:
        """The adapters by the names that their copies have."""
        return {self.name(home): adapter for home, (_, adapter) in self.made.items()}

    def trained(self, active: Collection[str]) -> frozenset[str]:
        """The parameters of which an active adapter has a copy."""
        return frozenset(p for p, adapter in self.made.values() if adapter in active)

    def check(self, active: Collection[str]) -> None:
        """Refuse two active adapters that replace one parameter. PSG312."""
        taken: dict[str, str] = {}
        for parameter, adapter in self.made.values():
            if adapter in active and taken.setdefault(parameter, adapter) != adapter:
                message = f"'{taken[parameter]}' and '{adapter}' both train '{parameter}'"
                hint = f"deactivate one of them: deactivate('{taken[parameter]}')"
                raise SurgeryError("PSG312", message, hint)

    def give_names(self, model: nn.Module) -> None:
        """Give every copied parameter's name to its first copy. To be done once, after the last."""
        for home, (parameter, _) in self.made.items():
            if self.first.setdefault(parameter, home) == home:
                _exchange(model, parameter, home)

    @contextmanager
    def all_at_home(self, model: nn.Module) -> Iterator[None]:
        """Give base tensors their own names, and copies their homes', within the context."""
        first, self.first = self.first, {}
        for parameter, home in first.items():
            _exchange(model, parameter, home)
        try:
            yield
        finally:
            self.first = first
            for parameter, home in first.items():
                _exchange(model, parameter, home)

    def fill(self, model: nn.Module) -> None:
        """Give copies that are on meta the values of the base's, all of them at home."""
        for home, (parameter, _) in self.made.items():
            copied = model.get_parameter(home)
            if copied.is_meta:
                value = model.get_parameter(parameter).detach().clone()
                trained = nn.Parameter(value, requires_grad=copied.requires_grad)
                torch.utils.swap_tensors(copied, trained)

    def rename(self, state: dict[str, Tensor], prefix: str, adapters: Collection[str]) -> None:
        """Give copies in a state dict, of these adapters or of all, the names they have here.

        A value under a parameter's own name is that of the one copy of these adapters that the
        state has not under its home; if that is not one, it is left out, since it would change the
        base.
        """
        mine = {
            home: owner
            for home, (owner, adapter) in self.made.items()
            if adapter in (adapters or [adapter])
        }
        for parameter in dict.fromkeys(mine.values()):
            homes = [home for home, owner in mine.items() if owner == parameter]
            found = {home: state.pop(prefix + home) for home in homes if prefix + home in state}
            lacking = [home for home in homes if home not in found]
            value = state.pop(prefix + parameter, None)
            if value is not None and len(lacking) == 1:
                found[lacking[0]] = value
            state.update({prefix + self.name(home): each for home, each in found.items()})


def _exchange(model: nn.Module, one: str, other: str) -> None:
    (here, first), (there, second) = owner_of(model, one), owner_of(model, other)
    mine, theirs = here._parameters, there._parameters
    mine[first], theirs[second] = theirs[second], mine[first]
