"""Directories that stand here for ones elsewhere, so that what reads files need not know of it.

Small files of a stand-in are whole. A hollow one has its beginning and its length, and no disk for
the rest: what is between is read from where it is, in blocks, of which the last few are kept until
their ends are read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from types import MappingProxyType

from peftsurgery.tensor_file import read_header

Range = tuple[str, int, int]  # a file's name, and its bytes from one to another, that not included

BLOCK = 4 * 2**20  # bytes that are asked for at once
KEPT = 2 + 2 * (os.cpu_count() or 1)  # blocks; a thread reads one or two files at a time


class FolderStandIn:
    """What a directory stands for, and how ranges of files there are read."""

    def __init__(
        self,
        url: str,
        read: Callable[[Sequence[Range]], list[bytes]],
        hollow: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Stand for ``url``; ``hollow`` has the sizes of the files that are not whole here."""
        self.url, self.read, self.hollow = url, read, dict(hollow)
        self._kept, self._lock = dict[tuple[str, int], bytes](), Lock()

    def made_hollow(self, file: Path) -> None:
        """Drop what is in a file, which is there; its header and its length stay. PSG207."""
        size = file.stat().st_size
        os.truncate(file, read_header(file).offset)
        os.truncate(file, size)
        self.hollow[file.name] = size
        with self._lock:
            self._kept.clear()

    def fill(self, name: str, room: memoryview, place: int) -> None:
        """Read from a place of a file on, until there is no more room; EOFError at its end."""
        if place + len(room) > self.hollow[name]:
            raise EOFError(f"{self.url}/{name} has become shorter")
        while room:
            number, start = divmod(place, BLOCK)
            block = self._block(name, number)
            part = memoryview(block)[start:][: len(room)]
            room[: len(part)] = part
            room, place = room[len(part) :], place + len(part)
            if start + len(part) == len(block):  # what reads on does not come back to it
                with self._lock:
                    self._kept.pop((name, number), None)

    def _block(self, name: str, number: int) -> bytes:
        """A block of a file: one of those that were read last, or read now."""
        start = number * BLOCK
        with self._lock:
            block = self._kept.get((name, number))
        if block is None:
            (block,) = self.read([(name, start, min(start + BLOCK, self.hollow[name]))])
        with self._lock:
            self._kept.pop((name, number), None)  # the last to be read is the last to go
            self._kept[name, number] = block
            while len(self._kept) > KEPT:
                del self._kept[next(iter(self._kept))]
        return block


_HERE: dict[Path, FolderStandIn] = {}


@contextmanager
def standing_in(folder: Path, stand_in: FolderStandIn) -> Iterator[None]:
    """Let a directory stand for another, as long as the block runs."""
    _HERE[folder] = stand_in
    try:
        yield
    finally:
        del _HERE[folder]


def stand_in_of(file: Path) -> FolderStandIn | None:
    """What has the bytes of a file, if it is hollow here."""
    found = _HERE.get(file.parent) if _HERE else None
    return found if found is not None and file.name in found.hollow else None


def called(folder: str | Path) -> str:
    """What a directory is called: by the URL of what it stands for, if it is no other."""
    found = _HERE.get(Path(folder))
    return str(folder) if found is None else found.url


def with_urls(text: str) -> str:
    """A message in which directories are called what they stand for."""
    for folder in sorted(_HERE, key=lambda each: -len(str(each))):
        text = text.replace(str(folder), _HERE[folder].url)
    return text
