"""Directories that grow over hours: written beside their name, resumed, and renamed when whole.

``OUT.part`` holds what is done of ``OUT``. A file in it is written under another name, flushed to
the disk and renamed, and only then entered in the journal, with the hash of what it holds. Whoever
resumes believes the journal of the same plan, and of a file only what its hash confirms: so the
journal itself need not be on the disk. The last step flushes the directory and renames it. A
process that is killed, or a disk that is full, leaves ``OUT.part``.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from peftsurgery.errors import SurgeryError

JOURNAL = ".journal"


@dataclass(frozen=True)
class PartFile:
    """A file in the making; threads may write parts of it at once."""

    name: str
    stream: FileIO

    def write(self, block: bytes | memoryview, place: int) -> None:
        """Write bytes from a place of the file on."""
        left = memoryview(block)
        while left:
            done = os.pwrite(self.stream.fileno(), left, place)
            left, place = left[done:], place + done


@dataclass(frozen=True)
class PartFolder:
    """A directory in the making, and what of it is done by name: what the journal says of each."""

    path: Path
    done: dict[str, Any]

    def begun(self, name: str) -> PartFile:
        """Begin a file; it has its name once it is :meth:`ended`."""
        file = self.path / name
        part = file.with_name(f".{file.name}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        return PartFile(name, FileIO(part, "w"))

    def ended(self, file: PartFile, said: Any = None) -> None:
        """Put a file that is whole in its place, and enter it in the journal with what is said."""
        os.fsync(file.stream.fileno())
        file.stream.close()
        os.replace(file.stream.name, self.path / file.name)
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
        with FileIO(self.path / JOURNAL, "a") as stream:  # at once: other threads have lines too
            stream.write(line.encode())
        self.done[name] = said


@contextmanager
def part_folder(out: Path, plan: str, resume: bool) -> Iterator[PartFolder]:
    """Make a directory beside ``out``, or with ``resume`` take up the one that is there.

    It becomes ``out`` when the block ends; if the block raises, it stays. ``plan`` identifies what
    is made. Raises SurgeryError: PSG603 if the system refuses, PSG610 if another process writes
    there, or if what is there was begun by another plan or is not to be resumed.
    """
    path = out.with_name(f"{out.name}.part")
    try:
        with _locked(path.with_name(f".{path.name}.lock"), path):
            done = _begun(path, plan, resume)
            try:
                yield PartFolder(path, done)
            except SurgeryError:  # trying again would end in the same way
                shutil.rmtree(path)
                raise
            for around, _, _ in os.walk(path):
                _flush_folder(Path(around))
            path.rename(out)  # with its journal: without, what is there could not be taken up
            (out / JOURNAL).unlink()
            _flush_folder(out.absolute().parent)
    except OSError as error:
        hint = f"what is done is in '{path}'; make room, and go on with --resume"
        why = error.strerror or error
        raise SurgeryError("PSG603", f"'{out}' cannot be written: {why}", hint) from error


def _begun(path: Path, plan: str, resume: bool) -> dict[str, Any]:
    """Make the directory, or read what is done of it. PSG610."""
    journal = path / JOURNAL
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
        journal.write_text(json.dumps({"plan": plan}) + "\n", encoding="utf-8")
        return {}
    if lines[0].get("plan") != plan:
        message = f"'{path}' was begun for another base, adapter or dtype"
        raise SurgeryError("PSG610", message, "remove it, and begin again")
    # without a line that was cut off, since further ones are put after it
    fresh = path / f"{JOURNAL}.part"
    fresh.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    fresh.replace(journal)
    return {str(line["file"]): line.get("said") for line in lines[1:] if "file" in line}


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
def _locked(lock: Path, path: Path) -> Iterator[None]:
    """Hold a lock, which a killed process gives back by itself. PSG610 if another one has it."""
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            message = f"another process is writing '{path}'"
            raise SurgeryError("PSG610", message, "wait for it") from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _flush_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
