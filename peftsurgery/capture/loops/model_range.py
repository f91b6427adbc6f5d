"""``range`` as a model's code sees it while it is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class ModelRange:
    """Stands for ``range`` among the names of a file; ``make`` gives what a call of it gives."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make

    def __call__(self, *bounds: Any) -> Any:
        """What ``range`` gives, or the turns of a loop."""
        return self.make(*bounds)

    def __instancecheck__(self, value: object) -> bool:
        """Whether a value is a range: code may ask."""
        return isinstance(value, range)
