"""Regular expressions of rule files, with a time limit on each search.

A pattern such as ``(a+)+b`` can take longer than the age of the universe on forty characters. The
``regex`` package can stop a search, so a pattern that backtracks without end is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from peftsurgery.errors import SurgeryError

SECONDS = 0.2
MAX_CHARACTERS, MAX_REPEATS = 1000, 10_000

# nested counts are written out when a pattern is compiled: ((a{99}){99}){99} fills the memory
_COUNTS = re.compile(r"\{\s*([0-9]*)\s*,?\s*([0-9]*)\s*\}")


def full_match(pattern: str, where: str | None = None) -> Callable[[str], bool]:
    """Compile a predicate: whether the whole of a text matches ``pattern``.

    Raises PSG141 for a pattern that is not valid; the test raises PSG140 when it takes too long.
    """
    if len(pattern) > MAX_CHARACTERS:
        message = f"a regular expression of {len(pattern)} characters"
        raise SurgeryError("PSG141", message, f"the limit is {MAX_CHARACTERS}", where)
    counts = (max(int(low or 1), int(high or 1)) for low, high in _COUNTS.findall(pattern))
    if math.prod(max(1, count) for count in counts) > MAX_REPEATS:
        message = f"'{pattern}' counts more than {MAX_REPEATS} repetitions"
        raise SurgeryError("PSG141", message, "use * or + instead", where)
    import regex  # as long to import as all of click, and few folds have a pattern

    try:
        compiled = regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise SurgeryError("PSG141", f"'{pattern}': {error}", where=where) from None

    def matches(text: str) -> bool:
        try:
            return compiled.fullmatch(text, timeout=SECONDS) is not None
        except TimeoutError:
            message = f"'{pattern}' searches '{text}' for longer than {SECONDS} s"
            hint = "remove nested repetitions such as (a+)+"
            raise SurgeryError("PSG140", message, hint, where) from None

    return matches
