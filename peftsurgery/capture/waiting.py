"""Parts that must really be called because of hooks or a replaced forward.

A model without any pays nothing for it. With some, each capture it serves gets a twin in which just
these parts are called; when the last hook is gone, the capture itself is served again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from peftsurgery.capture.called_parts import with_calls
from peftsurgery.capture.captures import Capture
from peftsurgery.capture.modules import Block, Part
from peftsurgery.capture.program import Program
from peftsurgery.capture.sharded import is_sharded
from peftsurgery.capture.threads import known_or_made
from peftsurgery.capture.watched import original_at
from peftsurgery.errors import SurgeryError

_GLOBAL = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


# So many twins are kept; those that nothing waits for any more go, the oldest first.
KEPT = 16


class Waiting:
    """Registry of the parts that must be called, and the captures rewritten to call them."""

    def __init__(self, model: nn.Module) -> None:
        self.noted: set[str] = set()
        self.twins: list[tuple[Capture, frozenset[str], Capture]] = []
        self._made = 0
        for path, part in model.named_modules():
            if isinstance(part, Part):
                part.watch(self, path)

    def __deepcopy__(self, memo: dict[int, Any]) -> Waiting:
        copied = object.__new__(Waiting)
        copied.noted, copied.twins, copied._made = set(self.noted), [], self._made
        memo[id(self)] = copied
        return copied

    def note(self, path: str) -> None:
        """Mark the part at a path as one that must be called."""
        self.noted.add(path)

    def serve(self, model: Part, capture: Capture) -> Capture:
        """The capture itself, or its twin that calls the marked parts.

        PSG220 if one of them cannot be called by itself, PSG226 if its weights are split. What
        waits for every part of any model (a hook for all modules) does not see those that are given
        or give an object of Python.
        """
        if not self.noted and not any(_GLOBAL):
            return capture
        awaited = {path for path in tuple(self.noted) if _is_awaited(model, path)}
        if any(_GLOBAL):
            every = capture.calls.items()
            awaited |= {p for p, calls in every if not any(c.is_opaque for c in calls)}
        wanted = frozenset(awaited)
        if not wanted:
            return capture
        return known_or_made(
            lambda: self._known(capture, wanted), lambda: self._twin(model, capture, wanted)
        )

    def replaced(self, model: Part) -> str | None:
        """Path of a part that was replaced by another module; None if there is none."""
        for path in sorted(self.noted):
            holder, _, name = path.rpartition(".")
            if original_at(model, holder)._modules.get(name) is not original_at(model, path):
                return path
        return None

    def _known(self, capture: Capture, wanted: frozenset[str]) -> Capture | None:
        """The twin of a capture for these parts, if it is kept."""
        fits = (t for known, parts, t in tuple(self.twins) if known is capture and parts == wanted)
        return next(fits, None)

    def _twin(self, model: Part, capture: Capture, wanted: frozenset[str]) -> Capture:
        for path in sorted(wanted):
            _check_undivided(model, path)
        twin = with_calls(capture, wanted, self._made)
        self._made += 1
        for block, programs in _blocks(model, twin):
            block.programs = {**block.programs, **{each.label: each for each in programs}}
        self.twins.append((capture, wanted, twin))
        while len(self.twins) > KEPT:
            _forget(model, *self.twins.pop(0)[::2])
        return twin


def _check_undivided(model: Part, path: str) -> None:
    """Refuse a part whose weights stay sharded while it is called. PSG226.

    FSDP2 puts those of its modules, and of what is in them, together (``unshard``) before a call.
    """
    names = path.split(".")
    around = [original_at(model, ".".join(names[:count])) for count in range(len(names) + 1)]
    stays = any(is_sharded(value) for value in around[-1]._parameters.values())
    if stays and not any(hasattr(part, "unshard") for part in around):
        message = f"'{path}' is split by a plan of tensor parallelism"
        hint = "fully_shard() its blocks, or split what fold() makes of the model"
        raise SurgeryError("PSG226", message, hint)


def _forget(model: Part, capture: Capture, twin: Capture) -> None:
    """Remove from the blocks the programs that only this twin uses."""
    own = {each.label for programs in capture.programs.values() for each in programs}
    for block, programs in _blocks(model, twin):
        gone = {each.label for each in programs} - own
        block.programs = {k: v for k, v in block.programs.items() if k not in gone}


def _blocks(model: Part, capture: Capture) -> Iterator[tuple[Block, Sequence[Program]]]:
    """The blocks of a model that a capture calls, with their programs in it."""
    for path, programs in capture.programs.items():
        block = original_at(model, path)
        if isinstance(block, Block):
            yield block, programs


def _is_awaited(model: Part, path: str) -> bool:
    """Whether the part at a path has hooks or its own forward, or was replaced."""
    holder, _, name = path.rpartition(".")
    around, part = original_at(model, holder), original_at(model, path)
    return part.is_awaited or around._modules.get(name) is not part
