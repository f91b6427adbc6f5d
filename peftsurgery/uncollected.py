"""Python's garbage collector, which waits while much is made that lives on.

Importing torch and transformers makes half a million objects, and a capture many more beside them.
The collector goes through all of them time and again, and finds next to nothing: that was a fifth
of an import's time, and up to half of a capture's.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Let the garbage collector wait within the context, if it is on.

    What was made meanwhile is taken for old, unless the process keeps frozen objects of its own.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if not gc.get_freeze_count():
                gc.freeze()
                gc.unfreeze()
            gc.enable()
