"""The zoo's models captured, once in a test session: tests that only read a capture share it."""

from __future__ import annotations

from functools import cache

from peftsurgery.capture import GraphModel, capture
from tests.models.zoo import ZOO


@cache
def captured(name: str) -> GraphModel:
    """The captured model of that name; not to be changed."""
    entry = ZOO[name]
    return capture(entry.build(), inputs=entry.inputs(2, 7))
