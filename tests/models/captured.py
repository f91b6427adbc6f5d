"""The zoo's models captured, once in a test session: tests that only read a capture share it."""

from __future__ import annotations

from functools import cache

from peftsurgery.capture import GraphModel, capture
from tests.models.state import state_of
from tests.models.zoo import ZOO

# The models that are as they were before they were captured.
UNCHANGED: set[str] = set()


@cache
def captured(name: str) -> GraphModel:
    """The captured model of that name; not to be changed."""
    entry = ZOO[name]
    module = entry.build()
    before = state_of(module)
    made = capture(module, inputs=entry.inputs(2, 7))
    if state_of(module) == before:
        UNCHANGED.add(name)
    return made
