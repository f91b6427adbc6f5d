"""The words of other programs, ``library.yaml``."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from peftsurgery.formats.words import words_of


@cache
def foreign_words() -> dict[str, Any]:
    """The table of the programs' words, read once."""
    return words_of(Path(__file__).with_name("library.yaml"))
