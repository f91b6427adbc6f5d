"""What the source of a loop says of it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from peftsurgery.capture.loops.source import LoopSource, loop_source


def of(function: Any) -> LoopSource | None:
    """The source of the one loop of a function."""
    lines, first = inspect.getsourcelines(function)
    (line,) = (n for n, text in enumerate(lines) if text.strip().startswith("for "))
    return loop_source(function.__code__, first + line)


def plain(x: Tensor, n: int) -> Tensor:
    outputs, state = [], x
    for i in range(n):
        step = x[i]
        state = state + step
        outputs.append(step)
    return torch.stack(outputs) + state


def test_names_are_told_by_what_becomes_of_them() -> None:
    assert of(plain) == LoopSource(
        index="i",
        assigned=frozenset({"step", "state"}),
        fresh=frozenset({"step"}),
        read_behind=frozenset({"state"}),
        joined=frozenset({"outputs"}),
    )


def left(x: Tensor, n: int) -> Tensor:
    for i in range(n):
        if x[i] > 0:
            break
    return x


def counted_on(x: Tensor, n: int) -> Tensor:
    for i in range(n):
        x = x + i
    return x * i


def by_twos(x: Tensor, n: int) -> Tensor:
    for i in range(0, n, 2):
        x = x + i
    return x


def otherwise(x: Tensor, n: int) -> Tensor:
    for i in range(n):
        x = x + i
    else:
        x = x * 2
    return x


def keeping(x: Any, n: int) -> Any:
    for i in range(n):
        x.last = x.first + i
    return x


def over_items(x: Tensor, n: int) -> Tensor:
    for step in x.unbind():
        x = x + step
    return x


@pytest.mark.parametrize("function", [left, counted_on, by_twos, otherwise, keeping, over_items])
def test_a_loop_in_which_there_is_more_is_left_alone(function: Any) -> None:
    assert of(function) is None


def measured(x: Tensor, n: int) -> Tensor:
    outputs = []
    for i in range(n):
        outputs.append(x[i])
    return torch.stack(outputs) * len(outputs)


def handed_on(x: Tensor, n: int, outputs: list[Tensor]) -> Tensor:
    for i in range(n):
        outputs.append(x[i])
    return torch.stack(outputs)


@pytest.mark.parametrize("function", [measured, handed_on])
def test_a_list_that_is_more_than_joined_is_not_followed(function: Any) -> None:
    found = of(function)
    assert found is not None
    assert found.joined == frozenset()


def test_without_source_there_is_no_loop() -> None:
    space: dict[str, Any] = {}
    exec("def f(x):\n    for i in range(x):\n        pass", space)
    assert loop_source(space["f"].__code__, 2) is None
