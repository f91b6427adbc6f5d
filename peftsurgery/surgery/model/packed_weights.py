"""A model that keeps some weights packed, seen from outside: what they are and what they weigh."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from peftsurgery.capture import GraphModel
from peftsurgery.capture.captures import Casts
from peftsurgery.capture.program import TensorInfo
from peftsurgery.surgery.fourbit.pack import Stored
from peftsurgery.surgery.fourbit.store import Store


class Keeping(GraphModel):
    """A captured model some of whose weights are packed, under the names that they had."""

    _store: Store

    @property
    def stored(self) -> Mapping[str, Stored]:
        """The base's weights that the model keeps packed, whichever adapters are active."""
        return self._store.weights

    @property
    def hidden(self) -> int:
        """Dense element count minus stored bytes, summed over packed weights."""
        return self._store.saved(dict(self.named_parameters(remove_duplicate=False)))

    def dense(self, name: str) -> torch.Tensor:
        """A parameter's value; that of a packed weight is unpacked, in the dtype it is read in."""
        return self._store.dense(name, self.read(name).detach())

    @abstractmethod
    def read(self, parameter: str, active: Collection[str] | None = None) -> nn.Parameter:
        """The parameter that a call reads by this name."""

    def original(self, name: str) -> TensorInfo:
        """The shape and the dtype that a parameter has in the base."""
        return self._captures.tensors[name]

    def _casts(self) -> Casts:
        return super()._casts() | self._store.casts(self)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self._store.cast(fn)
        return super()._apply(fn, recurse)
