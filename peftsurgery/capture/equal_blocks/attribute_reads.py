"""Who uses which attribute of a module in a trace, for attributes that tell blocks apart.

Equal blocks differ in a few attributes at most (``layer_idx``). As long as those are neither
read nor set, the blocks do the same. So a descriptor stands for each of them, which gives the
module's own value and notes that it was asked for.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from peftsurgery.capture.equal_blocks.likeness import Standing

_NOTHING = object()
Note = Callable[[dict[str, Any], str, FrameType], None]


class _Watcher(Standing):
    """Stands for one attribute of all objects of a class; ``note`` is told of every use."""

    def __init__(self, kind: type, name: str, note: Note) -> None:
        self.name, self.note, self.thread = name, note, threading.get_ident()
        self.own = vars(kind).get(name, _NOTHING)
        self.shadowed = inspect.getattr_static(kind, name, _NOTHING)

    def __get__(self, module: Any, kind: type) -> Any:
        if module is not None:
            self._noted(module)
            if self.name in module.__dict__:
                return module.__dict__[self.name]
        if self.shadowed is _NOTHING:
            raise AttributeError(self.name)
        bind = getattr(type(self.shadowed), "__get__", None)
        return self.shadowed if bind is None else bind(self.shadowed, module, kind)

    def __set__(self, module: Any, value: Any) -> None:
        self._noted(module)
        module.__dict__[self.name] = value

    def __delete__(self, module: Any) -> None:
        self._noted(module)
        try:
            del module.__dict__[self.name]
        except KeyError:
            raise AttributeError(self.name) from None

    def _noted(self, module: Any) -> None:
        if threading.get_ident() == self.thread:
            self.note(module.__dict__, self.name, sys._getframe(2))


@contextmanager
def noted_attributes(attributes: Collection[tuple[type, str]], note: Note) -> Iterator[None]:
    """Tell ``note`` of every use of these attributes: the object's dictionary, the name, who."""
    reads = [(kind, name, _Watcher(kind, name, note)) for kind, name in attributes]
    for kind, name, read in reads:
        type.__setattr__(kind, name, read)
    try:
        yield
    finally:
        for kind, name, read in reversed(reads):
            if read.own is _NOTHING:
                type.__delattr__(kind, name)
            else:
                type.__setattr__(kind, name, read.own)


def watchable(attributes: Collection[tuple[type, str]]) -> frozenset[tuple[type, str]]:
    """Those of the attributes that no class computes, whatever its objects keep by that name."""
    return frozenset(
        (kind, name)
        for kind, name in attributes
        if not hasattr(type(inspect.getattr_static(kind, name, None)), "__set__")
    )
