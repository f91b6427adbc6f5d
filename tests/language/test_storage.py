"""`store`: what a rule says of how a weight is kept."""

from __future__ import annotations

from typing import Any

import pytest

import peftsurgery as ps
from peftsurgery.language.expression import parse
from peftsurgery.language.storage import Storage, storage_of

SETTINGS = {"block": 128, "double": False, "compute": "bfloat16", "nothing": None}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("nf4()", Storage("nf4", 64, True, None)),
        ("nf4(block, double, compute)", Storage("nf4", 128, False, "bfloat16")),
        ("fp4(compute=nothing, block=32)", Storage("fp4", 32, True, None)),
        ("nf4() if double else fp4(4096)", Storage("fp4", 4096, True, None)),
    ],
)
def test_a_store_reads_settings(text: str, kept: Storage) -> None:
    assert storage_of(parse(text), SETTINGS) == kept


@pytest.mark.parametrize(
    ("text", "settings", "word"),
    [
        ("nf4(100)", {}, "100"),
        ("nf4(True)", {}, "True"),
        ("fp4(compute=c)", {"c": "float64"}, "float64"),
        ("nf4(double=2)", {}, "double"),
        ("64", {}, "no way to store"),
    ],
)
def test_what_no_storage_has_is_refused(text: str, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ps.SurgeryError, match=f"PSG146.*{word}"):
        storage_of(parse(text), settings)
