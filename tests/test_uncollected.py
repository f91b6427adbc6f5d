"""The garbage collector waits, and is as it was afterwards."""

from __future__ import annotations

import gc

import pytest

from peftsurgery.uncollected import uncollected


@pytest.fixture(params=[True, False], ids=["on", "off"])
def is_on(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_it_waits_within_and_is_as_it_was_after(is_on: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if is_on else gc.disable)()
        with uncollected(), uncollected():
            assert not gc.isenabled()
        assert gc.isenabled() is is_on
    finally:
        (gc.enable if before else gc.disable)()


def test_it_is_as_it_was_after_an_error() -> None:
    with pytest.raises(KeyError), uncollected():
        raise KeyError
    assert gc.isenabled()
