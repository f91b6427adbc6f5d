"""The parts of a model that something waits for to be called: hooks, a forward of their own.

A model without any pays nothing for it. With some, each capture it serves gets a twin in which just
these parts are called; when the last hook is gone, the capture itself is served again.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from .called_parts import with_calls
from .captures import Capture
from .parts import Block, Part
from .threads import making
from .watched import original_at

_GLOBAL = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


class Waiting:
    """What waits for calls of a model's parts, and the twins of captures in which they are made."""

    def __init__(self, model: nn.Module) -> None:
        self.noted: set[str] = set()
        self.twins: list[tuple[Capture, frozenset[str], Capture]] = []
        for path, part in model.named_modules():
            if isinstance(part, Part):
                part.watch(self, path)

    def __deepcopy__(self, memo: dict[int, Any]) -> Waiting:
        copied = object.__new__(Waiting)
        copied.noted, copied.twins = set(self.noted), []
        memo[id(self)] = copied
        return copied

    def note(self, path: str) -> None:
        """Something waits, from now on, for the part at a path."""
        self.noted.add(path)

    def serve(self, model: Part, capture: Capture) -> Capture:
        """The capture, or its twin in which the parts are called that something waits for.

        PSG220 if one of them cannot be called by itself.
        """
        if not self.noted and not any(_GLOBAL):
            return capture
        paths = capture.calls if any(_GLOBAL) else self.noted
        wanted = frozenset(path for path in paths if any(_GLOBAL) or _is_awaited(model, path))
        if not wanted:
            return capture
        for known, parts, twin in self.twins:
            if known is capture and parts == wanted:
                return twin
        with making():
            return self._twin(model, capture, wanted)

    def replaced(self, model: Part) -> str | None:
        """The path of a part in whose place another module is, if there is one."""
        for path in sorted(self.noted):
            holder, _, name = path.rpartition(".")
            if original_at(model, holder)._modules.get(name) is not original_at(model, path):
                return path
        return None

    def _twin(self, model: Part, capture: Capture, wanted: frozenset[str]) -> Capture:
        twin = with_calls(capture, wanted, len(self.twins))
        for path, programs in twin.programs.items():
            block = original_at(model, path)
            if isinstance(block, Block):
                block.programs = {**block.programs, **{each.label: each for each in programs}}
        self.twins.append((capture, wanted, twin))
        return twin


def _is_awaited(model: Part, path: str) -> bool:
    """Whether something waits for the part at a path: for itself, or in its place."""
    holder, _, name = path.rpartition(".")
    around, part = original_at(model, holder), original_at(model, path)
    return part.is_awaited or around._modules.get(name) is not part
