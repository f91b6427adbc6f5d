"""What rooms above offer to those below: functions that a method calls and may not import.

``o.diff()`` is a method of the operated model, and what compares models is made of such models. So
the method asks for ``diff`` here, by its name, and the package, which is above all rooms, says at
its import where each function is found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_FOUND: dict[str, Callable[[], Callable[..., Any]]] = {}


def offer(name: str, find: Callable[[], Callable[..., Any]]) -> None:
    """Offer a function under a name; ``find`` imports it when it is first asked for."""
    _FOUND[name] = find


def offered(name: str) -> Callable[..., Any]:
    """The function that is offered under a name."""
    return _FOUND[name]()
