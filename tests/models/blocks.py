"""Models of a few blocks, alike but for one thing, which an equal block would not do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

COUNT = 4


class Block(nn.Module):
    """A residual perceptron."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.inner = nn.Linear(8, 16)
        self.outer = nn.Linear(16, 8)
        self.drop = nn.Dropout(0.1)

    @staticmethod
    def given(x: Tensor) -> list[Any]:
        """What all blocks are given beside the states."""
        return []

    @staticmethod
    def before(block: Any, number: int) -> None:
        """What the model does before it calls a block."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.outer(F.gelu(self.inner(x))))


class Asks(Block):
    """Reads its depth in an ``if``."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if self.depth % 2 else super().forward(x)


class Gets(Block):
    """Reads its depth by a name."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * getattr(self, "de" + "pth")


class Hides(Block):
    """Reads its depth where nothing can watch it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.__dict__["depth"]


class Drops(Block):
    """Drops more the deeper it is."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.drop = nn.Dropout(0.1 * depth)


class Windows(Block):
    """Every third one has a window, as a config says."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.window = 4 if depth % 3 == 0 else None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.window is None else x.clamp(-self.window, self.window))


class Lists(Block):
    """Has a list, which is longer the deeper it is."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.factors = [2.0] * depth

    def forward(self, x: Tensor) -> Tensor:
        for factor in self.factors:
            x = x * factor
        return super().forward(x)


class Scales(Block):
    """Is scaled by a function that knows by how much."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.scale = functools.partial(torch.mul, other=depth)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(super().forward(x))


class Bound(Block):
    """Has a method of a list, of more elements in the first block."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.count = [0].__len__ if depth else [0, 0].__len__

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.count()


class Asked(Block):
    """Asks how many hooks there are of a kind that is not called."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        for _ in range(depth):
            self.inner.register_state_dict_post_hook(_nothing)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * len(self.inner._state_dict_hooks)


class Parametrized(Block):
    """Its weight is computed of another, by a function of its own."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        parametrize.register_parametrization(self.inner, "weight", nn.Softplus(1.0 + depth))


class Normed(Block):
    """Its weight is a direction and a length, along an axis of its own."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        parametrizations.weight_norm(self.inner, dim=depth % 2)


class Checkpointed(Block):
    """Is computed once more in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = checkpoint(super().forward, x * self.depth, use_reentrant=False)
        return made


def _nothing(*args: Any) -> None:
    """A hook that does nothing."""


TRAPS = (
    *(Asks, Gets, Hides, Drops, Windows, Lists, Scales, Bound, Asked, Parametrized, Normed),
    Checkpointed,
)


class Stack(nn.Module):
    """Blocks, one after the other, ``times`` times."""

    def __init__(self, kind: Callable[[int], Block], times: int = 1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind(depth) for depth in range(COUNT))
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        first: Any = self.blocks[0]
        given = first.given(x)
        for number, block in enumerate([*self.blocks] * self.times):
            first.before(block, number)
            x = block(x, *given)
        torch.set_grad_enabled(True)
        return x * sum(getattr(block, "depth", 0) for block in self.blocks)
