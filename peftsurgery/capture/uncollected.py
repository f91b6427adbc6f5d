"""Python's garbage collector, which waits while a capture is made.

A capture makes a great many objects that live on, beside the hundreds of thousands of torch and
transformers. The collector goes through them all time and again, and finds next to nothing: that
was up to half of a capture's time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Let the garbage collector wait within the context, if it is on."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
