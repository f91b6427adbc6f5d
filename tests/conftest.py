"""What the whole suite shares: one thread, one seed, and tests of one model in one worker."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# An example takes as long as the machine lets it: what is timed is in tools/bench.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same random numbers, whichever tests came before it."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a model together: a capture costs seconds, and a worker makes it once."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        model = None if callspec is None else callspec.params.get("name")
        group = model if isinstance(model, str) else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
