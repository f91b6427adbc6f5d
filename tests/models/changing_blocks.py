"""Blocks that something changes while the model runs: they are equal, and do not do the same."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import handwritten
from tests.models.blocks import Block

STATE: dict[str, int] = {"calls": 0}
DEPTH = 0
LIMIT = SimpleNamespace(depth=0)
RNG = random.Random(0)
FACTORS: Any = nn.Linear


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

    @staticmethod
    def before(block: Any, number: int) -> None:
        """Say it."""
        LIMIT.depth = number

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


def counter() -> Callable[[], int]:
    """A function that counts its calls."""
    calls = 0

    def count() -> int:
        nonlocal calls
        calls += 1
        return calls

    return count


SCALE = counter()


class Closes(Block):
    """Is scaled by a function that counts in its closure."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.scale = SCALE

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale()


class Appends(Block):
    """Adds to a list that it is given."""

    @staticmethod
    def given(x: Tensor) -> list[Any]:
        """What all blocks are given beside the states."""
        return [[]]

    def forward(self, x: Tensor, *seen: list[Any]) -> Tensor:
        seen[0].append(x)
        return super().forward(x) * len(seen[0])


class Marks(Block):
    """Changes a tensor that it is given once, and then lets it require gradients."""

    @staticmethod
    def given(x: Tensor) -> list[Any]:
        """A tensor that is not marked."""
        return [torch.zeros_like(x)]

    def forward(self, x: Tensor, *shared: Tensor) -> Tensor:
        if not shared[0].requires_grad:
            shared[0].add_(1).requires_grad_()
        return super().forward(x) + shared[0]


class Sets(Block):
    """Says of itself what the model reads afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        self.depth = 7
        return super().forward(x)


class Environment(Block):
    """Reads a variable of the process."""

    @staticmethod
    def before(block: Any, number: int) -> None:
        """Set it."""
        os.environ["BLOCKS"] = str(number)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * int(os.environ["BLOCKS"])


class Told(Block):
    """Reads a tensor that the model puts into it."""

    offset: Tensor

    @staticmethod
    def before(block: Any, number: int) -> None:
        """Put it there."""
        block.offset = torch.full((8,), number)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.offset


class OfClass(Block):
    """Reads what the model says to its class."""

    factor = 0

    @staticmethod
    def before(block: Any, number: int) -> None:
        """Say it."""
        OfClass.factor = number

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


class OfLibrary(Block):
    """Reads what the model says to a class of torch."""

    @staticmethod
    def before(block: Any, number: int) -> None:
        """Say it."""
        FACTORS.factor = number

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * getattr(self.inner, "factor", 1)


class OfModule(Block):
    """Reads what the model says to a module of Python, by a name that is made of two."""

    @staticmethod
    def before(block: Any, number: int) -> None:
        """Say it."""
        vars(handwritten)["_FACTOR"] = number

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * getattr(handwritten, "_FAC" + "TOR")


class Graded(Block):
    """Asks whether gradients are recorded."""

    @staticmethod
    def before(block: Any, number: int) -> None:
        """Record them for every other block."""
        torch.set_grad_enabled(number % 2 == 0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + int(torch.is_grad_enabled())


class Hooks(Block):
    """Puts a hook on a part of itself where it is called first."""

    def forward(self, x: Tensor) -> Tensor:
        self.inner.register_forward_hook(_twice)
        return super().forward(x)


def _twice(part: nn.Module, args: Any, result: Tensor) -> Tensor:
    return result * 2


CHANGING = (
    *(Counts, CountsAll, Keeps, Shares, Takes, Draws, DrawsOfAll, Closes, Appends, Marks, Sets),
    *(Environment, Told, OfClass, OfLibrary, OfModule, Graded, Hooks),
)


def restart() -> None:
    """Let what is kept outside of the models be as it was."""
    STATE["calls"], CountsAll.calls, Takes.turns = 0, 0, itertools.count(1)
    RNG.seed(0)
    LIMIT.depth = 0
    for cell in SCALE.__closure__ or ():
        cell.cell_contents = 0
