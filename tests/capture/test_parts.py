"""The parts of a module are those that ``named_modules`` gives, in its order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

from peftsurgery.capture.parts import named_parts
from tests.models.zoo import ZOO, entry


def check(module: nn.Module) -> None:
    for once in (True, False):
        ours, theirs = named_parts(module, once), list(module.named_modules(remove_duplicate=once))
        assert [name for name, _ in ours] == [name for name, _ in theirs]
        assert all(a is b for (_, a), (_, b) in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ZOO)
def test_the_parts_of_a_model(name: str) -> None:
    check(entry(name).make())


def test_parts_with_several_names_and_none() -> None:
    shared = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    module = nn.Sequential(shared, nn.ModuleList([shared, shared[0]]), shared[1])
    module.register_module("none", None)
    check(module)


class Telling(nn.Sequential):
    """Says of its second part that it is another's, and nothing of its first."""

    def named_modules(
        self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        yield prefix, self
        yield f"{prefix}.other" if prefix else "other", self[1]


def test_a_part_that_says_what_its_parts_are_is_asked() -> None:
    telling = Telling(nn.ReLU(), nn.Linear(1, 1))
    check(telling)
    check(nn.Sequential(nn.Linear(1, 1), telling, nn.Tanh()))
