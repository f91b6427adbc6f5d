"""torch, imported when it is first used.

Operators, initialisers and readings are torch code, and so belong to what a rule's text means; but
whoever only lists, prints or checks that text runs none of it, and starts in a tenth of the time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


class Lazily:
    """A module that is imported when one of its names is first looked up."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


if TYPE_CHECKING:
    import torch as torch
    from torch.nn import functional as functional
else:
    torch, functional = Lazily("torch"), Lazily("torch.nn.functional")
