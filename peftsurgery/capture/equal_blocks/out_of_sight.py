"""Parameters of blocks that will probably be filled in, kept out of a trace's sight.

torch.export does much for every parameter of a model, and that is most of what a capture of a deep
model costs. A block that another capture of the model filled in needs none of its parameters to be
filled in again: the nodes that are copied read them by name. So a further capture does not show
them to torch.export. Where such a block is not like one that was traced, or other code of the model
looks at its parameters, the trace ends, and is made again with everything in sight.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peftsurgery.capture.names import join
from peftsurgery.capture.parts import named_parts

Tables = Mapping[int, Mapping[str, torch.Tensor | None]]


class OutOfSightError(RuntimeError):
    """Code needs parameters that were kept out of sight."""


class Hidden:
    """The parameters of some blocks of a module; ``tables`` has those of all its parts, by part."""

    def __init__(self, module: nn.Module, blocks: Collection[str]) -> None:
        self.tables: dict[int, Mapping[str, torch.Tensor | None]] = {
            id(part): dict(part._parameters) for _, part in named_parts(module)
        }
        users = _counted(named_parts(module, remove_duplicate=False))
        self.parts: dict[int, list[nn.Module]] = {}
        self.thread = threading.get_ident()
        self._is_looked_at = False
        for path in blocks:
            block = module.get_submodule(path)
            if _is_apart(block, users):
                self.parts[id(block)] = list(block.modules())

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the parameters out of sight within the context."""
        parts = [part for parts in self.parts.values() for part in parts]
        before = [vars(part)["_parameters"] for part in parts]
        for part in parts:
            vars(part)["_parameters"] = _Unseen(self, part._parameters)
        try:
            yield
        finally:
            for part, table in zip(parts, before, strict=True):
                vars(part)["_parameters"] = table

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Let whoever looks for them within the context be told that they are out of sight."""
        self._is_looked_at = True
        try:
            yield
        finally:
            self._is_looked_at = False

    @contextmanager
    def unguarded(self) -> Iterator[None]:
        """What is asked within the context is no code of the model's."""
        before, self._is_looked_at = self._is_looked_at, False
        try:
            yield
        finally:
            self._is_looked_at = before

    def looked_at(self) -> None:
        """Somebody looked at a table that is kept out of sight."""
        if self._is_looked_at:
            raise OutOfSightError("a parameter is out of sight")

    def names(self, block: nn.Module) -> list[str]:
        """The names of a hidden block's parameters."""
        return [
            join(path, name)
            for path, part in named_parts(block, remove_duplicate=False)
            for name, value in self.tables[id(part)].items()
            if value is not None
        ]


class _Unseen(dict[str, Any]):
    """An empty table that tells when it is looked at, but for names that it never had.

    To other threads than the one that traces, it is the table itself: the module may be the user's
    own, and be called or saved meanwhile.
    """

    def __init__(self, hidden: Hidden, table: dict[str, Any]) -> None:
        super().__init__()
        self.hidden, self.table = hidden, table

    def is_for_another(self) -> bool:
        """Whether another thread asks than the one that traces."""
        return threading.get_ident() != self.hidden.thread

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A copy is a copy of the table, whoever makes it."""
        return dict, (self.table,)

    def __contains__(self, name: object) -> bool:
        has = name in self.table
        if self.is_for_another():
            return has
        if has:
            self.hidden.looked_at()
        return False


def _telling(name: str) -> Any:
    def ask(self: _Unseen, *args: Any, **kwargs: Any) -> Any:
        if self.is_for_another():
            return getattr(self.table, name)(*args, **kwargs)
        self.hidden.looked_at()
        return getattr(dict, name)(self, *args, **kwargs)

    return ask


for _name in (
    *("__iter__", "__len__", "__getitem__", "__setitem__", "__delitem__", "items", "keys"),
    *("values", "get", "pop", "update", "copy", "setdefault"),
):
    setattr(_Unseen, _name, _telling(_name))


def _is_apart(block: nn.Module, users: Counter[int]) -> bool:
    """Whether a block has parameters that nothing else has, and no buffer."""
    parts = named_parts(block, remove_duplicate=False)
    if any(buffer is not None for _, part in parts for buffer in part._buffers.values()):
        return False
    own = _counted(parts)
    return bool(own) and all(users[key] == count for key, count in own.items())


def _counted(parts: Iterable[tuple[str, nn.Module]]) -> Counter[int]:
    """How often each parameter is there, by its identity."""
    tensors = (tensor for _, part in parts for tensor in part._parameters.values())
    return Counter(id(tensor) for tensor in tensors if tensor is not None)
