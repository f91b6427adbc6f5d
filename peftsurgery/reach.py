"""Graph walks: everything reached from some nodes, each once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


def reach(
    start: Iterable[T],
    following: Callable[[T], Iterable[T]],
    stop: Callable[[T], bool] | None = None,
) -> Iterator[T]:
    """Yield ``start`` and all that ``following`` leads to, depth first, each once.

    What ``stop`` holds for is yielded, but not gone on from. Nothing is looked at before it is
    asked for: a search ends with the first that is wanted.
    """
    seen: set[T] = set()
    waiting = list(start)
    while waiting:
        found = waiting.pop()
        if found not in seen:
            seen.add(found)
            yield found
            if stop is None or not stop(found):
                waiting.extend(following(found))
