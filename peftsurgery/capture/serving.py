"""The captures that one model runs: for each choice that a call may make, made once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from peftsurgery.capture.captures import Capture
from peftsurgery.capture.threads import known_or_made


class Serving:
    """Captures as a model runs them, by what a call chooses (None where there is no choice)."""

    def __init__(self) -> None:
        # with the captures that they were made of, so that no other one has their identity
        self._made: dict[tuple[Hashable, int], tuple[Capture, Capture]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Serving:
        copied = Serving()
        copied._made = dict(self._made)  # captures are immutable, and shared by copies of a model
        return copied

    def ready(self, choice: Hashable, capture: Capture, make: Callable[[], Capture]) -> Capture:
        """The capture under a choice, made now if it is not there yet. Only making it waits."""
        key = (choice, id(capture))

        def made() -> tuple[Capture, Capture]:
            self._made[key] = (capture, make())
            return self._made[key]

        return known_or_made(lambda: self._made.get(key), made)[1]

    def captures(self, choice: Hashable) -> tuple[Capture, ...]:
        """The captures made under a choice, in the order in which they were made."""
        return tuple(ready for key, (_, ready) in list(self._made.items()) if key[0] == choice)
