"""Models of a few blocks, alike but for one thing, which an equal block would not do."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

COUNT = 4
STATE: dict[str, int] = {"calls": 0}
DEPTH = 0
LIMIT = SimpleNamespace(depth=0)
RNG = random.Random(0)


class Block(nn.Module):
    """A residual perceptron."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.inner = nn.Linear(8, 16)
        self.outer = nn.Linear(16, 8)
        self.drop = nn.Dropout(0.1)

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


class Counts(Block):
    """Counts its calls."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class CountsAll(Block):
    """Counts the calls of all, in the class."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        CountsAll.calls += 1
        return super().forward(x) * CountsAll.calls


class Keeps(Block):
    """Keeps something in a dictionary of the program."""

    def forward(self, x: Tensor) -> Tensor:
        STATE["calls"] += 1
        return super().forward(x) * STATE["calls"]


class Shares(Block):
    """Reads what the model says to all of them, in an object of the program."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * limit()


def limit() -> int:
    """A global, read by a function."""
    return LIMIT.depth + DEPTH


class Takes(Block):
    """Takes the next of something."""

    turns: Iterator[int] = itertools.count(1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * next(self.turns)


class Draws(Block):
    """Has a generator of its own."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.random = random.Random(depth)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.random.random()


class DrawsOfAll(Block):
    """Draws from a generator of the program."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * RNG.random()


class Scales(Block):
    """Is scaled by a function that knows by how much."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.scale = functools.partial(torch.mul, other=depth)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(super().forward(x))


class Closes(Block):
    """Is scaled by a function that counts in its closure."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.scale = SCALE

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale()


def counter() -> Callable[[], int]:
    """A function that counts its calls."""
    calls = 0

    def count() -> int:
        nonlocal calls
        calls += 1
        return calls

    return count


SCALE = counter()


class Appends(Block):
    """Adds to a list that it is given."""

    def forward(self, x: Tensor, seen: list[Any]) -> Tensor:
        seen.append(x)
        return super().forward(x) * len(seen)


TRAPS = (
    *(Asks, Gets, Hides, Drops, Windows, Lists, Counts, CountsAll, Keeps, Shares, Takes, Draws),
    *(DrawsOfAll, Scales, Closes, Appends),
)


class Stack(nn.Module):
    """Blocks, one after the other."""

    def __init__(self, kind: Callable[[int], Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind(depth) for depth in range(COUNT))
        self.gives = kind is Appends

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Any] = []
        for number, block in enumerate(self.blocks):
            LIMIT.depth = number
            x = block(x, seen) if self.gives else block(x)
        LIMIT.depth = 0
        return x


def restart() -> None:
    """Let what is kept outside of the models be as it was."""
    STATE["calls"], CountsAll.calls, Takes.turns = 0, 0, itertools.count(1)
    RNG.seed(0)
    for cell in SCALE.__closure__ or ():
        cell.cell_contents = 0
