"""Memory of buffers that are freed: whether the process keeps it, or the system gets it back.

glibc finds that out as it goes, for programs that are long under way. Here a process does one kind
of work only, and the kind is known. Other libraries of C have their own ways, and are left alone.
"""

from __future__ import annotations

from contextlib import suppress
from ctypes import CDLL

LARGE = 2**20  # bytes: parts of files that are read and sent have more
LARGEST = 2**25  # bytes: glibc keeps nothing that is larger
KEPT = 2**27  # bytes: some times what blocks of rows take while they are folded
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


def give_buffers_back() -> None:
    """Let this process give the memory of buffers back to the system as soon as they are freed.

    glibc keeps what it gave back before, up to 32 MiB at once: the largest parts of files that are
    read and sent, for each thread.
    """
    _set(_M_MMAP_THRESHOLD, LARGE)


def keep_buffers() -> None:
    """Let this process keep the memory of buffers that are freed, for those of the next block.

    Where the system gets it back, it has to find and clear each page anew, which on rented machines
    takes longer than to compute what is in it. All threads share one arena of glibc's: of
    one for each, each would keep what it once had.
    """
    _set(_M_MMAP_THRESHOLD, LARGEST)
    _set(_M_TRIM_THRESHOLD, KEPT)
    _set(_M_ARENA_MAX, 1)


def _set(what: int, value: int) -> None:
    with suppress(AttributeError, OSError):  # not glibc
        CDLL(None).mallopt(what, value)
