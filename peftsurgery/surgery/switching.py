"""Several adapters in one model: which of them take part in a call.

Every adapter stays in the model, and is saved with it, whether it is active or not. Switching
rewrites nothing that was rewritten before: a model keeps its programs for each set of adapters that
was active. What is inactive does not require gradients, so an optimizer made of the parameters that
do trains the active adapters alone; made active again, it trains as before. So do adapters that
another one is over: they take part in its call, and it alone is trained.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..capture import Capture, GraphModel
from ..capture.parts import Block
from ..errors import SurgeryError, did_you_mean
from ..language.where import layer_range
from .batches import batch_input
from .copies import Copies
from .fusing import fused_names
from .operation import Cut, Operation

NOTHING: Mapping[str, tuple[int | str, ...]] = MappingProxyType({})


@dataclass(frozen=True)
class Mode:
    """The adapters that take part in a call, in the order they were applied.

    ``by_row`` says that each row of the batch uses one of them, or none; ``left_out`` are the
    layers, as in a rule's `where`, in which one of them does nothing. ``entered`` says that the
    inputs are what the adapters that change inputs have made of them already.
    """

    names: tuple[str, ...] = ()
    by_row: bool = False
    left_out: tuple[tuple[str, tuple[int | str, ...]], ...] = ()
    entered: bool = False

    def leaves_out(self, cut: Cut) -> bool:
        """Whether a cut is not made: its adapter does nothing in its layer, or is done with it."""
        if self.entered and cut.rule.kind.resizes:
            return True
        ranges = [layer_range(item) for item in dict(self.left_out).get(cut.operation.name, ())]
        layer = cut.placed.layer
        return layer is not None and any(low <= layer <= high for low, high in ranges)


@dataclass(frozen=True)
class Rows:
    """The adapter of each row of a batch, whose rows may each be ``repeated`` for beams."""

    names: tuple[str | None, ...]
    repeated: bool = True

    def numbers(self, adapters: Sequence[str], batch: torch.Tensor) -> torch.Tensor:
        """For each row of ``batch`` its adapter's number among those, -1 without. PSG314."""
        size, named = len(batch), len(self.names)
        times = size // named if named else 0
        if times < 1 or times * named != size or (times > 1 and not self.repeated):
            raise SurgeryError(
                "PSG314",
                f"adapters are named for {named} rows, and the batch has {size}",
                "name one for each row; None is the base",
            )
        of = [-1 if name is None else adapters.index(name) for name in self.names]
        return torch.tensor(of, device=batch.device).repeat_interleave(times)


class Switchable(GraphModel):
    """A captured model with adapters that are switched on and off."""

    _operations: tuple[Operation, ...]
    _mode: Mode
    _copies: Copies
    _resting: set[str]
    _worked: frozenset[str]
    _rows: Rows | None = None

    @property
    def _choice(self) -> Mode:
        return self._mode

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of all adapters, in the order they were applied."""
        return tuple(dict.fromkeys(operation.name for operation in self._operations))

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that take part in a call, in the order they were applied."""
        return self._mode.names

    @property
    def is_by_row(self) -> bool:
        """Whether each row of a batch uses an adapter of its own, as within :meth:`rows`."""
        return self._mode.by_row

    @property
    def left_out(self) -> dict[str, list[int | str]]:
        """The layers in which an active adapter does nothing, by its name."""
        return {name: list(layers) for name, layers in self._mode.left_out}

    def activate(self, *names: str, leave_out: Iterable[int | str] = ()) -> None:
        """Let these adapters take part too; all of them if none is named. PSG310, PSG312.

        They do nothing in the layers to ``leave_out``, written as in a rule's `where` (0, "..4"),
        until they are activated again: AdapterDrop (Rücklé et al., 2021, arXiv:2010.11918).
        """
        wanted = self._known_names(names) or set(self.adapters)
        layers = tuple(leave_out)
        for item in layers:
            layer_range(item)
        kept = {n: left for n, left in self._mode.left_out if n not in wanted}
        left_out = {**kept, **(dict.fromkeys(wanted, layers) if layers else {})}
        self._switch(self._mode_of({*self.active, *wanted}, left_out))

    def deactivate(self, *names: str) -> None:
        """Leave these adapters out; all of them if none is named, which gives the base. PSG310."""
        unwanted = self._known_names(names) or set(self.adapters)
        self._switch(self._mode_of({*self.active} - unwanted, dict(self._mode.left_out)))

    @contextmanager
    def only(self, *names: str) -> Iterator[None]:
        """Within the context just these adapters take part; ``only()`` is the base. PSG310."""
        before = self._mode
        self._switch(self._mode_of(self._known_names(names), dict(before.left_out)))
        try:
            yield
        finally:
            self._switch(before)

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within the context each row of a batch uses the adapter named for it; None is the base.

        Rows are those of the first input's first axis. A batch of k times as many rows is taken for
        one in which each row was repeated k times in a row, as ``generate`` repeats them for beams
        and samples; any other is refused (PSG314). Which adapters are active makes no difference,
        and what is inactive is not trained. PSG310 for an unknown name, PSG313 where an adapter
        changes what the rows share.
        """
        with self._choosing(Rows(tuple(names))):
            yield

    @contextmanager
    def _choosing(self, rows: Rows) -> Iterator[None]:
        named = self._known_names(name for name in rows.names if name is not None)
        before, mode = self._rows, self._mode
        self._switch(replace(self._mode_of(named, dict(mode.left_out)), by_row=True))
        self._rows = rows
        try:
            yield
        finally:
            self._rows = before
            self._switch(mode)

    def forward(
        self, *args: Any, adapters: Sequence[str | None] | None = None, **kwargs: Any
    ) -> Any:
        """What the original returns with the active adapters, or with those named for the rows.

        ``adapters`` names one for each row of the batch, as in :meth:`rows`.
        """
        if adapters is None:
            return super().forward(*args, **kwargs)
        with self._choosing(Rows(tuple(adapters), repeated=False)):
            return super().forward(*args, **kwargs)

    def run(self, capture: Capture, leaves: Sequence[Any]) -> Any:
        """The outputs of a capture; a row-wise one is told the rows."""
        if self._rows is not None and self._mode.by_row:
            leaf = leaves[capture.names.index(batch_input(capture).name)]
            leaves = [*leaves, self._rows.numbers(self.active, leaf)]
        return super().run(capture, leaves)

    def _switch(self, mode: Mode) -> None:
        """Run in a mode from now on; nothing has changed if it cannot be."""
        in_place = () if mode.by_row else mode.names  # row by row, copies are read where they live
        self._copies.check(in_place)
        before = self._mode
        self._mode = mode
        if not mode.by_row:
            try:
                self.serve(self.base_capture)
            except SurgeryError:
                self._mode = before
                raise
            self._rest()
        self._copies.place(self, in_place)

    @property
    def working(self) -> tuple[str, ...]:
        """The active adapters that train: all but those that an active one is over."""
        active = [op for op in self._operations if op.name in self.active]
        fused = {name for operation in active for name in fused_names(operation)}
        return tuple(name for name in self.active if name not in fused)

    def _rest(self) -> None:
        """Let what does not work require no gradients, and what works again what it required."""
        working = frozenset(self.working)
        changed, self._worked = working ^ self._worked, working
        for name, adapter in self._owners.items() if changed else ():
            if adapter not in changed:
                continue
            parameter = self._learnt_parameter(name)
            if adapter in working and name in self._resting:
                self._resting.discard(name)
                parameter.requires_grad_(True)
            elif adapter not in working and parameter.requires_grad:
                self._resting.add(name)
                parameter.requires_grad_(False)

    def gradient_checkpointing(self, enabled: bool = True, every: int = 1) -> None:
        """Compute blocks again in the backward pass, with the copies that were in place."""
        super().gradient_checkpointing(enabled, every)
        for part in self.modules():
            if isinstance(part, Block) and self._copies.made:
                part.contexts = self._then

    def _then(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self._placing(self._copies.adapters)

    @contextmanager
    def _placing(self, adapters: frozenset[str]) -> Iterator[None]:
        """With the copies of these adapters in place."""
        now = self._copies.adapters
        if now == adapters:
            yield
            return
        self._copies.place(self, adapters)
        try:
            yield
        finally:
            self._copies.place(self, now)

    def freeze_as(self, other: Switchable) -> None:
        """Let this model train, of what both have, what the other one trains."""
        mine, working = self._owners, self.working
        for name in other._owners.keys() & mine.keys():
            trains = other._learnt_parameter(name).requires_grad or name in other._resting
            works = mine[name] in working
            self._learnt_parameter(name).requires_grad_(trains and works)
            self._resting.discard(name)
            if trains and not works:
                self._resting.add(name)

    def _learnt_parameter(self, name: str) -> nn.Parameter:
        """What an adapter has under this name, which is elsewhere if it is a copy in place."""
        return self.get_parameter(self._copies.name(name))

    def base_name(self, parameter: str) -> str:
        """Where the base's own tensor is now, of a parameter that adapters may have copies of."""
        return self._copies.base_name(parameter)

    def rename(self, state: dict[str, torch.Tensor], prefix: str) -> None:
        """Give what is in a state dict the names it has with the adapters that are active now."""
        self._copies.rename(state, prefix)

    @property
    @abstractmethod
    def _owners(self) -> Mapping[str, str]:
        """The adapter of every parameter that was added or copied, by the parameter's own name."""

    def _mode_of(
        self, names: Iterable[str], left_out: Mapping[str, tuple[int | str, ...]] = NOTHING
    ) -> Mode:
        chosen = set(names)
        active = tuple(name for name in self.adapters if name in chosen)
        left = tuple((n, left_out[n]) for n in active if n in left_out)
        return Mode(active, left_out=left)

    def _known_names(self, names: Iterable[str]) -> set[str]:
        known = set(names)
        for name in sorted(known):
            check_name(name, self.adapters)
        return known

    def extra_repr(self) -> str:
        """The adapters, and which of them are active."""
        shown = (n if n in self.active else f"{n} (inactive)" for n in self.adapters)
        return f"adapters: {', '.join(shown)}" if self.adapters else ""


def left_out_of(model: GraphModel) -> Mapping[str, tuple[int | str, ...]]:
    """The layers in which an active adapter of a model does nothing, by its name."""
    return dict(model._mode.left_out) if isinstance(model, Switchable) else NOTHING


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
