"""Captured models are copied, and not pickled: their programs are made anew from the model.

``copy`` and ``pickle`` ask an object the same question, how it is reduced to parts. So copies are
made here, as ``copy`` makes them of any module, and what asks for a reduction is a pickle.
"""

from __future__ import annotations

import copy
from typing import Any, NoReturn, Self, SupportsIndex

from torch import nn

from peftsurgery.errors import SurgeryError


class SharedByCopies:
    """What copies of a model share: it does not change, or what it holds is the same for them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class Copied(nn.Module):
    """A module that can be copied, and refuses to be pickled."""

    def __copy__(self) -> Self:
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise SurgeryError(
            "PSG216",
            f"a captured {type(self).__name__} cannot be pickled: its graphs are made of the model",
            "save(path) of a model with adapters writes them, and load(path) reads them; "
            "fold(model) is a plain module, and state_dict() holds tensors",
        )
