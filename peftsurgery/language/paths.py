"""Regular expressions from rule files, with a limit on how long they may search.

A pattern such as ``(a+)+b`` can take longer than the age of the universe on forty characters. The
``regex`` package can stop a search, so a pattern that backtracks without end is an error.
"""

from __future__ import annotations

from collections.abc import Callable

import regex

from peftsurgery.errors import SurgeryError

SECONDS = 0.2
MAX_CHARACTERS = 1000


def full_match(pattern: str, where: str | None = None) -> Callable[[str], bool]:
    """A test whether a whole text matches ``pattern``.

    Raises PSG141 for a pattern that is not valid; the test raises PSG140 when it takes too long.
    """
    if len(pattern) > MAX_CHARACTERS:
        message = f"a regular expression of {len(pattern)} characters"
        raise SurgeryError("PSG141", message, f"the limit is {MAX_CHARACTERS}", where)
    try:
        compiled = regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise SurgeryError("PSG141", f"'{pattern}': {error}", where=where) from None

    def test(text: str) -> bool:
        try:
            return compiled.fullmatch(text, timeout=SECONDS) is not None
        except TimeoutError:
            message = f"'{pattern}' searches '{text}' for longer than {SECONDS} s"
            hint = "remove nested repetitions such as (a+)+"
            raise SurgeryError("PSG140", message, hint, where) from None

    return test
