"""Several adapters in one model: which of them take part in a call.

Every adapter stays in the model, and is saved with it, whether it is active or not. Switching
rewrites nothing that was rewritten before: a model keeps its programs for each set of adapters that
was active. What is inactive does not require gradients, so an optimizer made of the parameters that
do trains the active adapters alone; made active again, it trains as before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from ..capture import Capture, GraphModel
from ..errors import SurgeryError, did_you_mean
from .copies import Copies
from .operation import Operation


@dataclass(frozen=True)
class Mode:
    """The adapters that take part in a call, in the order they were applied."""

    names: tuple[str, ...] = ()


class Switchable(GraphModel):
    """A captured model with adapters that are switched on and off."""

    _operations: tuple[Operation, ...]
    _mode: Mode
    _copies: Copies
    _resting: set[str]
    _served_by_mode: dict[Mode, dict[int, Capture]]

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of all adapters, in the order they were applied."""
        return tuple(dict.fromkeys(operation.name for operation in self._operations))

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that take part in a call, in the order they were applied."""
        return self._mode.names

    def activate(self, *names: str) -> None:
        """Let these adapters take part too; all of them if none is named. PSG310, PSG312."""
        wanted = self._known_names(names) or set(self.adapters)
        self._switch(self._mode_of({*self.active, *wanted}))

    def deactivate(self, *names: str) -> None:
        """Leave these adapters out; all of them if none is named, which gives the base. PSG310."""
        unwanted = self._known_names(names) or set(self.adapters)
        self._switch(self._mode_of({*self.active} - unwanted))

    @contextmanager
    def only(self, *names: str) -> Iterator[None]:
        """Within the context just these adapters take part; ``only()`` is the base. PSG310."""
        before = self._mode
        self._switch(self._mode_of(self._known_names(names)))
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, mode: Mode) -> None:
        """Run in a mode from now on; nothing has changed if it cannot be."""
        self._copies.check(mode.names)
        before = self._mode
        self._mode, self._served = mode, self._served_by_mode.setdefault(mode, {})
        try:
            self.serve(self.base_capture)
        except SurgeryError:
            self._mode, self._served = before, self._served_by_mode[before]
            raise
        self._copies.place(self, mode.names)
        self._rest(mode.names)

    def _rest(self, active: Iterable[str]) -> None:
        """Let what is inactive require no gradients, and what is active again what it required."""
        for name, adapter in self._adapters_of_tensors().items():
            parameter = self._learnt_parameter(name)
            if adapter in active and name in self._resting:
                self._resting.discard(name)
                parameter.requires_grad_(True)
            elif adapter not in active and parameter.requires_grad:
                self._resting.add(name)
                parameter.requires_grad_(False)

    def freeze_as(self, other: Switchable) -> None:
        """Let this model train, of what both have, what the other one trains."""
        mine = self._adapters_of_tensors()
        for name in other._adapters_of_tensors().keys() & mine.keys():
            trains = other._learnt_parameter(name).requires_grad or name in other._resting
            is_active = mine[name] in self.active
            self._learnt_parameter(name).requires_grad_(trains and is_active)
            self._resting.discard(name)
            if trains and not is_active:
                self._resting.add(name)

    def _learnt_parameter(self, name: str) -> nn.Parameter:
        """What an adapter has under this name, which is elsewhere if it is a copy in place."""
        return self.get_parameter(self._copies.name(name))

    def _adapters_of_tensors(self) -> Mapping[str, str]:
        """The adapter of every parameter that was added or copied, by the parameter's own name."""
        raise NotImplementedError

    def _mode_of(self, names: Iterable[str]) -> Mode:
        chosen = set(names)
        return Mode(tuple(name for name in self.adapters if name in chosen))

    def _known_names(self, names: Iterable[str]) -> set[str]:
        for name in names:
            check_name(name, self.adapters)
        return set(names)

    def extra_repr(self) -> str:
        """The adapters, and which of them are active."""
        shown = (n if n in self.active else f"{n} (inactive)" for n in self.adapters)
        return f"adapters: {', '.join(shown)}" if self.adapters else ""


def check_name(name: str, names: Iterable[str]) -> None:
    """Refuse the name of an adapter that a model does not have. PSG310."""
    known = list(names)
    if name not in known:
        hint = did_you_mean(name, known) if known else "it has no adapters"
        raise SurgeryError("PSG310", f"there is no adapter '{name}'", hint)
