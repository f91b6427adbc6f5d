"""A file in the making: written in parts at any place of it, and flushed to the disk meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from threading import Thread

from peftsurgery.checkpoint.tensor_bytes import CHUNK

WRITTEN = 2**18  # bytes that are written at once; for more, Linux looks for large pages, and waits
FLUSHED = 2**24  # bytes that are written before the disk is to have them


@dataclass
class PartFile:
    """A file in the making; threads and processes may write parts of it at once.

    After every :data:`FLUSHED` bytes, a thread waits until the disk has them, unless one still
    does. Else the disk would have nothing to do until the file is whole, and then all of it at
    once: to be told that there is more is not enough for one that keeps what it is given in memory
    of its own, as those of rented machines do.
    """

    name: str
    stream: FileIO
    _waiting: int = 0
    _flush: Thread | None = field(default=None, repr=False, compare=False)

    def write(self, block: bytes | memoryview, place: int) -> None:
        """Write bytes from a place of the file on."""
        left = memoryview(block)
        size = len(left)
        while left:
            done = os.pwrite(self.stream.fileno(), left[:WRITTEN], place)
            left, place = left[done:], place + done
        self._waiting += size  # another thread's count may be lost, which is none of the file's
        if self._waiting >= FLUSHED and (self._flush is None or not self._flush.is_alive()):
            self._waiting = 0
            self._begin_flush()

    def write_apart(self, content: memoryview, size: int, place: int, step: int) -> None:
        """Write pieces of ``size`` bytes, each ``step`` bytes further on than the one before."""
        for start in range(0, len(content), size):
            self.write(content[start : start + size], place)
            place += step

    def read(self, place: int, size: int) -> Iterator[bytes]:
        """What was written from a place on, so many bytes of it, some at a time."""
        end = place + size
        while place < end:
            block = os.pread(self.stream.fileno(), min(CHUNK, end - place), place)
            yield block
            place += len(block)

    def close(self) -> None:
        """Wait until all of it is on the disk, and close it. OSError for what could not be."""
        os.fsync(self.stream.fileno())
        self.stream.close()

    def _begin_flush(self) -> None:
        """Have a thread flush what was written; nothing where the system refuses one.

        The system tells of a failed write once to each that has opened the file. So the thread
        opens it anew: what fails is left for :meth:`close` to be told.
        """
        with suppress(OSError):
            handle = os.open(f"/proc/self/fd/{self.stream.fileno()}", os.O_WRONLY | os.O_CLOEXEC)
            self._flush = Thread(target=_flushed, args=(handle,), daemon=True)
            try:
                self._flush.start()
            except RuntimeError:  # no further threads
                os.close(handle)


def _flushed(handle: int) -> None:
    """Flush a file and close it."""
    with suppress(OSError):
        os.fdatasync(handle)
    os.close(handle)
