"""Adapters of one model: names, the choice of calls, and which are trained.

Every adapter stays in the model, and is saved with it, whether it is active or not. What a call
chooses (:mod:`.choices`) is handed down to the programs that serve it, and nothing in the model
changes for a call. What is inactive does not require gradients, so an optimizer made of the
parameters that do trains the active adapters alone; made active again, it trains as before. So do
adapters that another one is over: they take part in its call, and it alone is trained.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import nn

from peftsurgery.capture.signature import takes
from peftsurgery.capture.tensors import parameters_of
from peftsurgery.capture.watched import original_at
from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.language.where import layer_range
from peftsurgery.surgery.model.choices import Choice, Choices, named_rows
from peftsurgery.surgery.model.trained_copies import TrainedCopies
from peftsurgery.surgery.plan.fusion import fused_names
from peftsurgery.surgery.plan.mode import Mode, mode_of
from peftsurgery.surgery.plan.plan import Plan

Layers = Mapping[str, Iterable[int | str]]
"""By adapter: layers in which it does nothing, each written as in a rule's `where` (0, "..4")."""
NOTHING: Layers = MappingProxyType({})
BASE = "__base__"  # what peft calls a row without an adapter, in `adapter_names`

# Whether a parameter requires gradients is the same for all threads: one of them changes it.
_TRAINING = threading.Lock()


class Adapters:
    """Adapters of one model, in the order they were applied.

    ``copies`` are those that they have of the base's parameters, ``choices`` says which of them
    take part in a call, ``owners`` is the adapter of every parameter that was added or copied: by
    its name, of a copy by its home.
    """

    def __init__(self, plan: Plan, copies: TrainedCopies) -> None:
        self.names = tuple(dict.fromkeys(operation.name for operation in plan.operations))
        self.copies = copies
        self.choices = Choices()
        copied = {home: adapter for home, (_, adapter) in self.copies.made.items()}
        self.owners = {**plan.added, **copied}
        self._over = [(operation.name, fused_names(operation)) for operation in plan.operations]
        self._awake: Counter[str] = Counter()  # the open blocks, of all threads, that they train in
        self._working = frozenset(self.names)
        self._resting: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapters:
        copied = copy.copy(self)
        copied.copies, copied.choices = copy.deepcopy((self.copies, self.choices), memo)
        copied._awake, copied._resting = Counter(), set(self._resting)
        return copied

    @property
    def mode(self) -> Mode:
        """Mode of a call that names no adapters, in this thread or task."""
        return self.choices.now.mode

    @property
    def default(self) -> Mode:
        """The model's own mode, for all threads."""
        return self.choices.default.mode

    def known(self, names: Iterable[str]) -> set[str]:
        """Validate names of adapters. Raises PSG310 for an unknown one."""
        found = set(names)
        for name in sorted(found):
            check_name(name, self.names)
        return found

    def to_save(self, names: Collection[str] | None) -> list[str]:
        """Names of the adapters to save: all, or those given. Raises PSG310."""
        if names is None:
            return list(self.names)
        chosen = [names] if isinstance(names, str) else list(names)
        for name in chosen:  # it may be anything, and not to be put in a set
            check_name(name, self.names)
        if not chosen:
            hint = "names=None saves them all"
            raise SurgeryError("PSG310", "no adapter is named to be saved", hint)
        return chosen

    def mode_with(self, before: Mode, names: Iterable[str], left_out: Layers = NOTHING) -> Mode:
        """Mode in which exactly these take part, with these layers left out.

        PSG310 for an unknown name, PSG106 for what is no layer.
        """
        changed = {name: tuple(layers) for name, layers in left_out.items()}
        for item in (item for layers in changed.values() for item in layers):
            layer_range(item)
        self.known(changed)
        return mode_of(self.names, self.known(names), {**dict(before.left_out), **changed})

    def choice(self, names: Any, repeated: bool = True) -> Choice:
        """Choice that gives each row of a batch its adapter, None the base. PSG310, PSG314."""
        rows = named_rows(names, repeated)
        mode = self.mode_with(self.mode, (name for name in rows.names if name is not None))
        return Choice(replace(mode, by_row=True), rows)

    def take_choice(self, module: nn.Module, kwargs: dict[str, Any], repeated: bool) -> Choice:
        """Take the choice of adapters out of a call's arguments. Raises PSG314."""
        given = {
            name: kwargs.pop(name)
            for name in ("adapters", "adapter_names")
            if name in kwargs and not takes(module, name)
        }
        named = [value for value in given.values() if value is not None]
        if not named:
            return self.choices.now
        if len(named) > 1:
            hint = "adapter_names= is peft's word for adapters="
            raise SurgeryError("PSG314", "adapters are named for the rows twice", hint)
        if isinstance(named[0], Choice):
            return named[0]
        if given.get("adapter_names") is None:
            return self.choice(named[0], repeated)
        rows = named_rows(named[0])
        return self.choice([None if name == BASE else name for name in rows.names], repeated)

    def working(self, mode: Mode) -> frozenset[str]:
        """Adapters that train in a mode: active ones, but for those inside a fusion."""
        fused = {name for owner, over in self._over if owner in mode.names for name in over}
        return frozenset(mode.names) - fused

    def resting(self, model: nn.Module, mode: Mode) -> list[nn.Parameter]:
        """Parameters of the adapters that rest in a mode."""
        working = self.working(mode)
        rest = (name for name, adapter in self.owners.items() if adapter not in working)
        return [self.parameter(model, name) for name in rest]

    def choose(self, model: nn.Module, mode: Mode) -> None:
        """Set the model's own mode, and train what works in it."""
        self.choices.default = Choice(mode)
        self._wake(model, Counter())

    @contextmanager
    def choosing(self, model: nn.Module, mode: Mode) -> Iterator[None]:
        """Set the mode of this thread's calls within the context, and train what works in it."""
        working = Counter(self.working(mode))
        self._wake(model, working)
        try:
            with self.choices.within(Choice(mode)):
                yield
        finally:
            self._wake(model, Counter(dict.fromkeys(working, -1)))

    def trains(self, model: nn.Module) -> dict[str, bool]:
        """Trainability of each adapter parameter while its adapter works, by name."""
        return {
            name: name in self._resting or self.parameter(model, name).requires_grad
            for name in self.owners
        }

    def train(self, model: nn.Module, trains: Mapping[str, bool]) -> None:
        """Set which adapter parameters are trained while their adapters work."""
        working = self.working(self.mode)
        for name in self.owners.keys() & trains.keys():
            works = self.owners[name] in working
            self._let_train(model, name, trains[name] and works)
            self._resting.discard(name)
            if trains[name] and not works:
                self._resting.add(name)

    def parameter(self, model: nn.Module, name: str) -> nn.Parameter:
        """An adapter's parameter by its stable name, wherever the model holds it."""
        return model.get_parameter(self.copies.name(name))

    def _wake(self, model: nn.Module, adapters: Counter[str]) -> None:
        """Count open contexts that use these adapters, which stay trainable meanwhile."""
        with _TRAINING:
            self._awake.update(adapters)
            self._awake = +self._awake
            working = self.working(self.default) | self._awake.keys()
            changed, self._working = working ^ self._working, working
            for name, adapter in self.owners.items() if changed else ():
                if adapter in changed:
                    self._rest(model, name, adapter in working)

    def _rest(self, model: nn.Module, name: str, works: bool) -> None:
        """Freeze parameters of inactive adapters, and restore those of active ones."""
        if works and name in self._resting:
            self._resting.discard(name)
            self._let_train(model, name, True)
        elif not works and self.parameter(model, name).requires_grad:
            self._resting.add(name)
            self._let_train(model, name, False)

    def _let_train(self, model: nn.Module, name: str, trains: bool) -> None:
        """Set whether an adapter's parameter of that name is trained."""
        owner, _, leaf = self.copies.name(name).rpartition(".")
        for parameter in parameters_of(original_at(model, owner), leaf):
            parameter.requires_grad_(trains)


def check_name(name: str, names: Iterable[str]) -> None:
    """Refuse the name of an adapter that a model does not have. PSG310."""
    known = list(names)
    if name not in known:
        hint = did_you_mean(str(name), known) if known else "it has no adapters"
        raise SurgeryError("PSG310", f"there is no adapter '{name}'", hint)


def check_left_out(left_out: Layers, name: str, code: str) -> None:
    """Refuse, by ``code``, an adapter that does nothing in some layers, where that is lost."""
    layers = left_out.get(name)
    if layers:
        listed = ", ".join(map(str, layers))
        message = f"'{name}' does nothing in layers {listed}, and would act in them"
        raise SurgeryError(code, message, f"activate('{name}') lets it act in all of them here too")
