"""Switching of adapters: which of them take part in a call.

Every adapter stays in the model, and is saved with it, whether it is active or not. What a call
chooses (:mod:`.choices`) is handed down to the programs that serve it: a model keeps programs for
each choice that was made, and nothing in it changes for a call. What is inactive does not require
gradients, so an optimizer made of the parameters that do trains the active adapters alone; made
active again, it trains as before. So do adapters that another one is over: they take part in its
call, and it alone is trained.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from peftsurgery.capture import Capture, GraphModel
from peftsurgery.capture.signature import Call, takes
from peftsurgery.capture.tensors import parameters_of
from peftsurgery.capture.watched import original_at
from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.language.where import layer_range
from peftsurgery.surgery.model.choices import Choice, Choices, rows_of
from peftsurgery.surgery.model.trained_copies import Copies
from peftsurgery.surgery.plan.cut import Operation
from peftsurgery.surgery.plan.fusion import fused_names
from peftsurgery.surgery.plan.mode import Mode, mode_of
from peftsurgery.surgery.rewrite.batch_axis import batch_input

NOTHING: Mapping[str, tuple[int | str, ...]] = MappingProxyType({})
BASE = "__base__"  # what peft calls a row without an adapter, in `adapter_names`

# Whether a parameter requires gradients is the same for all threads: one of them changes it.
_RESTING = threading.Lock()


class Switchable(GraphModel):
    """Captured model whose adapters can be switched on and off."""

    _operations: tuple[Operation, ...]
    _choices: Choices
    _copies: Copies
    _resting: set[str]
    _worked: frozenset[str]

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of all adapters, in the order they were applied."""
        return tuple(dict.fromkeys(operation.name for operation in self._operations))

    def read_from(self) -> Iterator[str | Path | None]:
        """The places of the base and of what was put on it."""
        yield from super().read_from()
        for operation in self._operations:
            yield operation.origin.place
            yield from operation.file.sources

    @property
    def mode(self) -> Mode:
        """What a call chooses that names no adapters, in this thread or task."""
        return self._choices.now.mode

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that take part in a call, in the order they were applied."""
        return self.mode.names

    @property
    def is_by_row(self) -> bool:
        """Whether each row of a batch uses an adapter of its own, as within :meth:`rows`."""
        return self.mode.by_row

    @property
    def left_out(self) -> dict[str, list[int | str]]:
        """The layers in which an adapter does nothing whenever it takes part, by its name."""
        return {name: list(layers) for name, layers in self.mode.left_out}

    def activate(self, *names: str, leave_out: Iterable[int | str] = ()) -> None:
        """Activate adapters, all if none is named. Raises PSG310, PSG312.

        This is the model's own choice, for all threads, but for calls that choose by themselves.
        The adapters do nothing in the layers to ``leave_out``, written as in a rule's `where` (0,
        "..4"), until they are activated again: AdapterDrop (Rücklé et al., 2021, arXiv:2010.11918).
        """
        wanted = self._known_names(names) or set(self.adapters)
        before = self._choices.default.mode
        left_out = self._leaving(dict.fromkeys(wanted, tuple(leave_out)))
        self._switch(mode_of(self.adapters, {*before.names, *wanted}, left_out))

    def choose(self, *names: str) -> None:
        """Activate exactly these adapters; none for the base. Raises PSG310, PSG312.

        As :meth:`activate`, for the model's own choice, but layers that are left out stay left out.
        """
        self._switch(mode_of(self.adapters, self._known_names(names), self._leaving({})))

    def set_left_out(self, layers: Mapping[str, Iterable[int | str]]) -> None:
        """Let adapters, active or not, do nothing in these layers. PSG106, PSG310."""
        self._known_names(layers)
        left_out = self._leaving({name: tuple(items) for name, items in layers.items()})
        self._switch(mode_of(self.adapters, self._choices.default.mode.names, left_out))

    def _leaving(
        self, layers: Mapping[str, tuple[int | str, ...]]
    ) -> dict[str, tuple[int | str, ...]]:
        """What is left out, with other layers for some adapters. PSG106 for what is no layer."""
        for items in layers.values():
            for item in items:
                layer_range(item)
        return {**dict(self._choices.default.mode.left_out), **layers}

    def deactivate(self, *names: str) -> None:
        """Deactivate adapters, all (so the base) if none is named. Raises PSG310.

        As :meth:`activate`, for the model's own choice.
        """
        unwanted = self._known_names(names) or set(self.adapters)
        before = self._choices.default.mode
        self._switch(mode_of(self.adapters, {*before.names} - unwanted, dict(before.left_out)))

    @contextmanager
    def only(self, *names: str) -> Iterator[None]:
        """Use exactly these adapters within the context; ``only()`` is the base. PSG310, PSG312.

        That is so for calls of this thread, or of this async task, and for no others.
        """
        mode = mode_of(self.adapters, self._known_names(names), dict(self.mode.left_out))
        self._check(mode)
        working = self._working_in(mode)
        self._wake(Counter(working))
        try:
            with self._choices.within(Choice(mode)):
                yield
        finally:
            self._wake(Counter(working), asleep=True)

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Use, within the context, the adapter named for each row of a batch; None is the base.

        That is so for calls of this thread, or of this async task. Rows are those of the first
        input's first axis. A batch of k times as many rows is taken for one in which each row was
        repeated k times in a row, as ``generate`` repeats them for beams and samples; any other is
        refused (PSG314). Which adapters are active makes no difference, and what is inactive is not
        trained. PSG310 for an unknown name, PSG313 where an adapter changes what the rows share.
        """
        with self._choices.within(self._by_row(names)):
            yield

    def _by_row(self, names: Any, repeated: bool = True) -> Choice:
        """The choice of calls whose rows have these adapters. PSG310, PSG314."""
        rows = rows_of(names, repeated)
        named = self._known_names(name for name in rows.names if name is not None)
        mode = mode_of(self.adapters, named, dict(self.mode.left_out))
        return Choice(replace(mode, by_row=True), rows)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with the active adapters, or with those named for the batch's rows.

        ``adapters=[...]`` names one for each row of the batch, None for the base, for this call
        alone. ``adapter_names=[...]`` does the same in peft's words: the base is ``"__base__"``.
        Either is the original's if its forward has an argument of that name.
        """
        choice = self.chosen(kwargs, repeated=False)
        self.bind()
        call = self.call_of(*args, **kwargs)
        capture = self.find(call, choice.mode)
        values = self.run(capture, _leaves(capture, call, choice))
        return self.finished(pytree.tree_unflatten(values, capture.output), choice.mode)

    @abstractmethod
    def finished(self, outputs: Any, mode: Mode) -> Any:
        """What a call in this mode returns, of what its programs gave."""

    def chosen(self, kwargs: dict[str, Any], repeated: bool) -> Choice:
        """What a call with these arguments chooses, which are taken out of them. PSG314."""
        given = {
            name: kwargs.pop(name)
            for name in ("adapters", "adapter_names")
            if name in kwargs and not takes(self.source.module, name)
        }
        named = [value for value in given.values() if value is not None]
        if not named:
            return self._choices.now
        if len(named) > 1:
            hint = "adapter_names= is peft's word for adapters="
            raise SurgeryError("PSG314", "adapters are named for the rows twice", hint)
        if isinstance(named[0], Choice):
            return named[0]
        if given.get("adapter_names") is None:
            return self._by_row(named[0], repeated)
        rows = rows_of(named[0])
        return self._by_row([None if name == BASE else name for name in rows.names], repeated)

    @abstractmethod
    def find(self, call: Call, mode: Mode | None = None) -> Capture:
        """The capture that serves a call in a mode: in that of this thread unless given."""

    def _check(self, mode: Mode) -> None:
        """Refuse what cannot be run: two copies of one parameter (PSG312), or by the rules."""
        self._copies.check(mode.replacing)
        if not mode.by_row:
            self.serve(self.base_capture, mode)

    @abstractmethod
    def serve(self, capture: Capture, mode: Mode | None = None) -> Capture:
        """A capture ready to be run in a mode: in that of this thread unless given."""

    def _switch(self, mode: Mode) -> None:
        """Let the model choose a mode from now on; nothing has changed if it cannot be."""
        self._check(mode)
        self._choices.default = Choice(mode)
        self._wake(Counter())

    @property
    def working(self) -> tuple[str, ...]:
        """The active adapters that train: all but those that an active one is over."""
        return self._working_in(self.mode)

    def _working_in(self, mode: Mode) -> tuple[str, ...]:
        active = [op for op in self._operations if op.name in mode.names]
        fused = {name for operation in active for name in fused_names(operation)}
        return tuple(name for name in mode.names if name not in fused)

    def _wake(self, adapters: Counter[str], asleep: bool = False) -> None:
        """Count open contexts that use these adapters, which stay trainable meanwhile."""
        with _RESTING:
            choices = self._choices
            choices.awake = choices.awake - adapters if asleep else choices.awake + adapters
            working = frozenset((*self._working_in(choices.default.mode), *choices.awake))
            changed, self._worked = working ^ self._worked, working
            if changed:
                self._rest(working, changed)

    def _rest(self, working: frozenset[str], changed: frozenset[str]) -> None:
        """Freeze parameters of inactive adapters, and restore those of active ones."""
        for name, adapter in self._owners.items():
            if adapter not in changed:
                continue
            if adapter in working and name in self._resting:
                self._resting.discard(name)
                self._let_train(name, True)
            elif adapter not in working and self._learnt_parameter(name).requires_grad:
                self._resting.add(name)
                self._let_train(name, False)

    def _let_train(self, name: str, trains: bool) -> None:
        """Set whether an adapter's parameter of that name is trained."""
        owner, _, leaf = self._copies.name(name).rpartition(".")
        for parameter in parameters_of(original_at(self, owner), leaf):
            parameter.requires_grad_(trains)

    def freeze_as(self, other: Switchable) -> None:
        """Copy ``requires_grad`` of shared parameters from another model."""
        mine, working = self._owners, self.working
        for name in other._owners.keys() & mine.keys():
            trains = other._learnt_parameter(name).requires_grad or name in other._resting
            works = mine[name] in working
            self._let_train(name, trains and works)
            self._resting.discard(name)
            if trains and not works:
                self._resting.add(name)

    def _learnt_parameter(self, name: str) -> torch.Tensor:
        """What an adapter has under this name, which is elsewhere if it is a copy in place."""
        return self.get_parameter(self.name_of(name))

    def name_of(self, value: str) -> str:
        """Current name of a parameter that :meth:`values` lists."""
        return self._copies.name(value)

    def base_name(self, parameter: str) -> str:
        """Where the base's own tensor is, of a parameter that adapters may have copies of."""
        return self._copies.base_name(parameter)

    def read(self, parameter: str, active: Collection[str] | None = None) -> nn.Parameter:
        """What a call reads for a parameter of the base: an active adapter's copy, or its own."""
        active = self.mode.replacing if active is None else active
        return self.get_parameter(self._copies.read(parameter, active))

    def rename(
        self, state: dict[str, torch.Tensor], prefix: str = "", adapters: Sequence[str] = ()
    ) -> None:
        """Give copies in a state dict, of these adapters or of all, the names they have here."""
        self._copies.rename(state, prefix, adapters or self.adapters)

    @property
    @abstractmethod
    def _owners(self) -> Mapping[str, str]:
        """The adapter of every parameter that was added or copied, by the parameter's own name."""

    def _known_names(self, names: Iterable[str]) -> set[str]:
        known = set(names)
        for name in sorted(known):
            check_name(name, self.adapters)
        return known

    def extra_repr(self) -> str:
        """The adapters, and which of them are active."""
        shown = (n if n in self.active else f"{n} (inactive)" for n in self.adapters)
        return f"adapters: {', '.join(shown)}" if self.adapters else ""


def _leaves(capture: Capture, call: Call, choice: Choice) -> list[Any]:
    """The values that a capture takes: a call's, and the numbers of the rows' adapters."""
    if choice.rows is None:
        return call.leaves
    leaves = call.leaves
    batch = leaves[capture.names.index(batch_input(capture).name)]
    return [*leaves, choice.rows.numbers(choice.mode.names, batch)]


def left_out_of(model: GraphModel) -> Mapping[str, tuple[int | str, ...]]:
    """The layers in which an adapter of a model does nothing, by its name."""
    return dict(model.mode.left_out) if isinstance(model, Switchable) else NOTHING


def check_left_out(model: Switchable, name: str, code: str) -> None:
    """Refuse, by ``code``, an adapter that does nothing in some layers, where that is lost."""
    layers = model.left_out.get(name)
    if layers:
        listed = ", ".join(map(str, layers))
        message = f"'{name}' does nothing in layers {listed}, and would act in them"
        raise SurgeryError(code, message, f"activate('{name}') lets it act in all of them here too")


def check_name(name: str, names: Iterable[str]) -> None:
    """Refuse the name of an adapter that a model does not have. PSG310."""
    known = list(names)
    if name not in known:
        hint = did_you_mean(str(name), known) if known else "it has no adapters"
        raise SurgeryError("PSG310", f"there is no adapter '{name}'", hint)
