"""Weights with adapters in them, for serving: beside the base's own, which stay as they are.

    encoder.0.query.weight            the base's own tensor, shared with the base
    encoder.0.query.weight_merged_0   the same with the adapters of the first merged mode in it

Calls that choose a merged mode run the base's programs, which read the second name where there is
one. So nothing is subtracted again: taking the adapters out is leaving the second names. State
dicts, other models of the same base and other threads know nothing of them.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peftsurgery.capture.sharded import first_sharded
from peftsurgery.capture.threads import making
from peftsurgery.capture.watched import original_at
from peftsurgery.errors import SurgeryError
from peftsurgery.surgery.plan.mode import Mode

Weights = Mapping[str, torch.Tensor]

_COUNTING = threading.Lock()


class MergedWeights:
    """Merged weights of one model, by the mode whose adapters are in them.

    They are held while a context is open, a call runs or the model's own choice is merged, and let
    go by the last of these. A mode has the same names again when it is merged again, so its
    programs are made once.
    """

    def __init__(self) -> None:
        self._numbers: dict[Mode, int] = {}
        self._names: dict[Mode, dict[str, str]] = {}
        self._holders: Counter[Mode] = Counter()

    def __deepcopy__(self, memo: dict[int, Any]) -> MergedWeights:
        copied = MergedWeights()
        copied._numbers, copied._names = dict(self._numbers), dict(self._names)
        copied._holders = Counter(self._names.keys())
        return copied

    def names(self, mode: Mode) -> Mapping[str, str]:
        """The names of merged weights by those of the base's; none in a mode that is not merged."""
        return self._names.get(mode, {})

    def hold(self, model: nn.Module, mode: Mode, weights: Callable[[], Weights]) -> None:
        """Hold the weights of a merged mode; ``weights`` makes them if nothing holds them yet.

        Pair with `release`. Nothing is changed if ``weights`` raises.
        """
        if self._held_again(mode):
            return
        with making():
            if self._held_again(mode):
                return  # another thread merged it
            made = weights()
            number = self._numbers.setdefault(mode, len(self._numbers))
            names = {name: f"{name}_merged_{number}" for name in made}
            for name, value in made.items():
                part, leaf = _place(model, names[name])
                part.register_buffer(leaf, value, persistent=False)
            with _COUNTING:
                self._names[mode], self._holders[mode] = names, 1

    def _held_again(self, mode: Mode) -> bool:
        """Count one holder more, if there are any."""
        with _COUNTING:
            self._holders[mode] += mode in self._names
            return mode in self._names

    def release(self, model: nn.Module, mode: Mode) -> None:
        """Undo one `hold`; the weights go with the last one."""
        with _COUNTING:
            self._holders[mode] -= 1
            if self._holders[mode]:
                return
            for name in self._names.pop(mode).values():
                part, leaf = _place(model, name)
                delattr(part, leaf)

    @contextmanager
    def within(
        self, model: nn.Module, mode: Mode, weights: Callable[[], Weights]
    ) -> Iterator[None]:
        """Hold the weights of a merged mode within the context."""
        self.hold(model, mode, weights)
        try:
            yield
        finally:
            self.release(model, mode)


def check_evaluated(model: nn.Module) -> None:
    """Refuse merged weights in training. PSG355."""
    if model.training:
        message = "merged weights cannot be trained: the adapters in them would learn nothing"
        raise SurgeryError("PSG355", message, "call eval() first, or leave merged() to train")


def check_mergeable(model: nn.Module) -> None:
    """Refuse to merge in training, and weights that are shared out among processes. PSG355."""
    check_evaluated(model)
    sharded = first_sharded(model)
    if sharded is not None:
        message = f"'{sharded}' is shared out among processes, and cannot be merged"
        raise SurgeryError("PSG355", message, "merge the model before it is sharded, or fold it")


def gone() -> Weights:
    """Refuse a call whose merged weights have been let go. PSG355."""
    message = "the merged weights of this call have been taken out again"
    raise SurgeryError("PSG355", message, "call the model within merged(), or after merge()")


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The part that holds a tensor, and the tensor's name in it."""
    owner, _, leaf = name.rpartition(".")
    return original_at(model, owner), leaf
