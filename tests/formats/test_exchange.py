"""What formats share: values of configs, and which settings can have them."""

from __future__ import annotations

from typing import Any

import pytest

from peftsurgery.formats.words import fits_setting


@pytest.mark.parametrize(
    ("value", "default", "counts", "fits"),
    [
        (1, 8, True, True),
        (0, 8, True, False),
        (1.0, 8, True, False),
        (True, 8, True, False),
        (1.5, 8, False, True),
        (0, 0.1, False, True),
        (-0.1, 0.1, False, False),
        (2**63, 1, False, False),
        (float("nan"), 0.1, False, False),
        (float("inf"), 0.1, False, False),
        (True, 0.1, False, False),
        ("1", 1, False, False),
        (True, False, False, True),
        (1, False, False, False),
        ("relu", "swish", False, True),
        (None, "swish", False, False),
        ([1], [], False, True),
        ("1", [], False, False),
    ],
)
def test_a_value_is_of_its_settings_kind(
    value: Any, default: Any, counts: bool, fits: bool
) -> None:
    assert fits_setting(value, default, counts) == fits
