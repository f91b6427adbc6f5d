"""Directories that grow over hours: written beside their name, resumed, and renamed when whole.

``OUT.part`` holds what is done of ``OUT``. A file in it is written under another name, flushed to
the disk and renamed, and only then entered in the journal, with the hash of what it holds. Whoever
resumes believes the journal of the same plan, and of a file only what its hash confirms: so the
journal itself need not be on the disk. The last step flushes the directory and renames it. A
process that is killed, or a disk that is full, leaves ``OUT.part``.

Several processes, on machines that share the directory, can make it in parts. Each has a journal
and a lock of its own; the lock of the whole is held to begin and to finish.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from peftsurgery.checkpoint.part_file import PartFile
from peftsurgery.errors import SurgeryError

JOURNAL = ".journal"
WAIT, PAUSE = 60.0, 0.02  # seconds: for others to begin or finish, and from one look to the next


@dataclass(frozen=True)
class FoldPart:
    """The ``number``-th of so many parts, counted from 1."""

    number: int
    of: int

    def mine(self, names: Iterable[str]) -> list[str]:
        """The names that fall to this part: every so-many-th."""
        return [*names][self.number - 1 :: self.of]

    @staticmethod
    def parse(text: str) -> FoldPart:
        """Read a part as it is asked for, "2/3". PSG904 for what is none."""
        number, slash, of = text.partition("/")
        if not slash or not (number.isdecimal() and of.isdecimal()) or len(of) > 6:
            raise SurgeryError("PSG904", f"{text!r:.40} is no part", "write K/N, such as 2/3")
        if not 1 <= int(number) <= int(of):
            raise SurgeryError("PSG904", f"there is no part {text:.40}", "count from 1/N to N/N")
        return FoldPart(int(number), int(of))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(frozen=True)
class PartFolder:
    """A directory in the making, and what of it is done by name: what the journal says of each."""

    path: Path
    done: dict[str, Any]
    journal: str = JOURNAL

    def begun(self, name: str) -> PartFile:
        """Begin a file; it has its name once it is :meth:`ended`."""
        return PartFile(name, FileIO(self._part(name), "w+"))

    def opened(self, name: str) -> PartFile:
        """Write further parts of a file that another process has begun."""
        return PartFile(name, FileIO(self._part(name), "r+"))

    def adopted(self, file: PartFile) -> PartFile:
        """Begin a file with what is in one that has no name yet. OSError if the system refuses.

        It stays opened as it was before it was written: of a write that failed, whoever opened it
        anew would not be told.
        """
        part, handle = self._part(file.name), file.stream.fileno()
        part.unlink(missing_ok=True)
        handles = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
        try:  # with a directory, since a link there would be linked itself without
            os.link(str(handle), part, src_dir_fd=handles, follow_symlinks=True)
        finally:
            os.close(handles)
        return PartFile(file.name, FileIO(os.dup(handle), "r+"))

    def _part(self, name: str) -> Path:
        """What a file is called until it is whole."""
        file = self.path / name
        part = file.with_name(f".{file.name}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        return part

    def ended(self, file: PartFile, said: Any = None) -> None:
        """Put a file that is whole in its place, and enter it in the journal with what is said."""
        file.close()
        os.replace(self._part(file.name), self.path / file.name)
        self.enter(file.name, said)

    def write(self, name: str, blocks: Iterable[bytes | memoryview], said: Any = None) -> None:
        """Write a file of blocks that follow one another."""
        file, place = self.begun(name), 0
        with file.stream:
            for block in blocks:
                file.write(block, place)
                place += len(block)
            self.ended(file, said)

    def enter(self, name: str, said: Any = None) -> None:
        """Note in the journal that a file is there."""
        line = json.dumps({"file": name, "said": said}) + "\n"
        with FileIO(
            self.path / self.journal, "a"
        ) as stream:  # at once: other threads have lines too
            stream.write(line.encode())
        self.done[name] = said


# Makes a directory: where, by what plan, and whether what is done of it is taken up.
Making = Callable[[Path, str, bool], AbstractContextManager[PartFolder]]


@contextmanager
def part_folder(out: Path, plan: str, resume: bool) -> Iterator[PartFolder]:
    """Make a directory beside ``out``, or with ``resume`` take up the one that is there.

    It becomes ``out`` when the block ends; if the block raises, it stays. ``plan`` identifies what
    is made. Raises SurgeryError: PSG603 if the system refuses, PSG610 if another process writes
    there, or if what is there was begun by another plan, in parts, or is not to be resumed.
    """
    path = _beside(out)
    with _system_errors(out), _locked(path):
        yield from _put(_begun(path, plan, resume), out)


@contextmanager
def own_part(out: Path, plan: str, part: FoldPart) -> Iterator[PartFolder]:
    """Make a part of a directory beside ``out``, or take up what is done of it.

    Other processes may make other parts at once. If the block raises, all of it stays. Raises
    SurgeryError: PSG603 if the system refuses, PSG610 if another process makes this part or the
    whole, or if what is there was begun by another plan or in another number of parts.
    """
    path, journal = _beside(out), f"{JOURNAL}-{part.number}"
    with _system_errors(out), _locked(path, part.number):
        with _locked(path, wait=WAIT):
            begun = _begun(path, plan, True, part.of)
            lines = _lines(path / journal)  # that it was whole is not so while it is made again
            kept = [line for line in lines if line.get("file") != _whole(part.number)]
            _rewritten(path / journal, kept)
        into = PartFolder(path, begun.done, journal)
        yield into
        into.enter(_whole(part.number))


@contextmanager
def all_parts(out: Path, plan: str, parts: int | None) -> Iterator[PartFolder | list[int]]:
    """The directory that was made in parts, or the parts of it that are not made.

    It becomes ``out`` when the block ends. No part at all is missing of what has become that
    already. Raises what :func:`own_part` raises; ``parts`` is None for whoever does not know their
    number.
    """
    path = _beside(out)
    with _system_errors(out), _locked(path, wait=WAIT):
        if not (path / JOURNAL).is_file():
            yield []
            return
        begun = _begun(path, plan, True, parts)
        count = _lines(path / JOURNAL)[0].get("parts", 1)
        missing = [k for k in range(1, count + 1) if _whole(k) not in begun.done]
        if missing:
            yield missing
        else:
            yield from _put(begun, out)


def _whole(part: int) -> str:
    """What a journal calls it that a part is whole."""
    return f".part-{part}"


def _put(into: PartFolder, out: Path) -> Iterator[PartFolder]:
    """Let a directory be finished, and give it its name."""
    try:
        yield into
    except SurgeryError:  # trying again would end in the same way
        shutil.rmtree(into.path)
        raise
    for around, _, _ in os.walk(into.path):
        _flush_folder(Path(around))
    into.path.rename(out)  # with its journals: without, what is there could not be taken up
    for journal in _journals(out):
        journal.unlink()
    _flush_folder(out.absolute().parent)


def _beside(out: Path) -> Path:
    return out.with_name(f"{out.name}.part")


@contextmanager
def _system_errors(out: Path) -> Iterator[None]:
    """Say by PSG603 what the system refuses."""
    try:
        yield
    except OSError as error:
        hint = f"what is done is in '{_beside(out)}'; once that is mended, go on with --resume"
        why = error.strerror or error
        raise SurgeryError("PSG603", f"'{out}' cannot be written: {why}", hint) from error


def _begun(path: Path, plan: str, resume: bool, parts: int | None = 1) -> PartFolder:
    """Make the directory, or read what is done of it. PSG610."""
    journal, first = path / JOURNAL, {"plan": plan, "parts": parts}
    if not os.path.lexists(path):
        path.mkdir()
    elif not resume:
        message = f"'{path}' is there: a run that did not end"
        raise SurgeryError("PSG610", message, "go on with --resume, or remove it")
    elif not path.is_dir() or path.is_symlink():
        raise SurgeryError("PSG610", f"'{path}' is not a directory", "remove it")
    lines = _lines(journal)
    if not lines:
        _clear(path)
        _rewritten(journal, [first])
        return PartFolder(path, {})
    if lines[0].get("plan") != plan:
        message = f"'{path}' was begun for another base, adapter or dtype"
        raise SurgeryError("PSG610", message, "remove it, and begin again")
    made_in = lines[0].get("parts", 1)
    if parts not in (None, made_in):
        how = "by one process" if made_in == 1 else f"in {made_in} parts"
        hint = "go on with --resume" if made_in == 1 else f"go on with --part K/{made_in}"
        raise SurgeryError("PSG610", f"'{path}' was begun {how}, not in {parts}", hint)
    _rewritten(journal, lines)
    entries = [line for each in _journals(path) for line in _lines(each)]
    done = {str(line["file"]): line.get("said") for line in entries if "file" in line}
    return PartFolder(path, done)


def _journals(path: Path) -> list[Path]:
    """The journals of all who made a directory, the whole's first."""
    return [path / JOURNAL, *sorted(path.glob(f"{JOURNAL}-*"))]


def _rewritten(journal: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a journal without a line that was cut off, since further ones are put after it."""
    fresh = journal.with_name(f".part{journal.name}")
    fresh.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    fresh.replace(journal)


def _lines(journal: Path) -> list[dict[str, Any]]:
    """The entries of a journal; the last may have been cut off while it was written."""
    if not journal.is_file():
        return []
    entries = []
    for line in journal.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return [entry for entry in entries if isinstance(entry, dict)]


def _clear(path: Path) -> None:
    """Remove what a run left that did not get as far as its journal. PSG610 for anything else."""
    strange = [each for each in path.iterdir() if not each.name.startswith(".")]
    if strange:
        message = f"'{path}' holds '{strange[0].name}', and no journal"
        raise SurgeryError("PSG610", message, "it is not ours; move it away")
    shutil.rmtree(path)
    path.mkdir()


@contextmanager
def _locked(path: Path, part: int | None = None, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock of the whole or of a part, which a killed process gives back by itself.

    PSG610 if another one has it for more than ``wait`` seconds.
    """
    own = "lock" if part is None else f"{part}.lock"
    lock, end = path.with_name(f".{path.name}.{own}"), time.monotonic() + wait
    while True:
        with lock.open("w") as stream:
            if _holds(stream.fileno(), lock):
                try:
                    yield
                finally:
                    lock.unlink(missing_ok=True)
                return
        if time.monotonic() >= end:
            what = f"'{path}'" if part is None else f"part {part} of '{path}'"
            raise SurgeryError("PSG610", f"another process is writing {what}", "wait for it")
        time.sleep(PAUSE)


def _holds(handle: int, lock: Path) -> bool:
    """Whether the lock could be had, and is still the file of its name: holders remove it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(handle), lock.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _flush_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
