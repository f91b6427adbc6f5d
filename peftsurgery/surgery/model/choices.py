"""The adapters that one call uses: a value that is passed down, never stored in the model.

    default     the model's own choice, which activate() and deactivate() change for all threads
    within      the choice of this thread, or of this async task, inside ``with only(...)``
    a call      what ``adapters=`` names, for this call alone

The innermost one counts. A generator that yields inside ``with only(...)`` lends its choice to
whoever iterates it until it goes on, as Python's context variables do; the choice ends with the
block, in whatever order blocks end. A thread that is started inside begins with the model's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from peftsurgery.capture import Capture
from peftsurgery.capture.signature import Call
from peftsurgery.errors import SurgeryError
from peftsurgery.surgery.plan.mode import Mode
from peftsurgery.surgery.rewrite.batch_axis import batch_input


@dataclass(frozen=True)
class Rows:
    """The adapter of each row of a batch, whose rows may each be ``repeated`` for beams."""

    names: tuple[str | None, ...]
    repeated: bool = True

    def numbers(self, adapters: Sequence[str], batch: torch.Tensor) -> torch.Tensor:
        """Adapter number of each row of ``batch``, -1 for the base, as an int64 tensor. PSG314."""
        times = self.times(len(batch))
        of = [-1 if name is None else adapters.index(name) for name in self.names]
        numbers = torch.tensor(of, device=batch.device)
        return numbers if times == 1 else numbers.repeat_interleave(times)

    def times(self, size: int) -> int:
        """Repeats of each row in a batch of this size. Raises PSG314 if they are uneven."""
        named = len(self.names)
        times = size // named if named else 0
        if times < 1 or times * named != size or (times > 1 and not self.repeated):
            message = f"adapters are named for {named} rows, and the batch has {size}"
            raise SurgeryError("PSG314", message, "name one for each row; None is the base")
        return times


def named_rows(names: Any, repeated: bool = True) -> Rows:
    """Validate adapter names given for rows. Raises PSG314."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        hint = "name one for each row of the batch, as in ['law', None]; None is the base"
        raise SurgeryError("PSG314", f"{names!r:.60} names no adapter for each row", hint)
    listed = tuple(names)
    for name in listed:
        if name is not None and not isinstance(name, str):
            hint = "a row has one adapter; combine(...) makes one of several"
            raise SurgeryError("PSG314", f"a row's adapter is {name!r:.60}, and no name", hint)
    return Rows(listed, repeated)


@dataclass(frozen=True)
class Choice:
    """What one call chooses: the adapters, and the rows that have them if each has its own.

    ``prepared`` says that its inputs are what the adapters that change inputs made of them already.
    """

    mode: Mode
    rows: Rows | None = None
    prepared: bool = False

    def leaves(self, capture: Capture, call: Call) -> tuple[Any, ...]:
        """Input values of a capture: the call's, and the adapter number of each row."""
        if self.rows is None:
            return call.leaves
        batch = call.leaves[capture.names.index(batch_input(capture).name)]
        return (*call.leaves, self.rows.numbers(self.mode.names, batch))


@dataclass(frozen=True, eq=False)
class _OpenBlock:
    """One open ``with`` block: its owner, and the choice it makes."""

    owner: Choices
    choice: Choice


_OPEN: ContextVar[tuple[_OpenBlock, ...]] = ContextVar("the choices of open blocks", default=())


class Choices:
    """Current choices of one model's calls, by thread and task."""

    def __init__(self) -> None:
        self.default = Choice(Mode())

    def __deepcopy__(self, memo: dict[int, Any]) -> Choices:
        copied = Choices()
        copied.default = self.default
        return copied

    @property
    def now(self) -> Choice:
        """Choice of a call that names no adapters."""
        for entry in reversed(_OPEN.get()):
            if entry.owner is self:
                return entry.choice
        return self.default

    @contextmanager
    def within(self, choice: Choice) -> Iterator[None]:
        """Make calls of this thread or task use this choice within the context."""
        entry = _OpenBlock(self, choice)
        _OPEN.set((*_OPEN.get(), entry))
        try:
            yield
        finally:  # not what was there before: blocks of two generators may end in any order
            _OPEN.set(tuple(each for each in _OPEN.get() if each is not entry))
