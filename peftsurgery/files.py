"""Files that others may have made: read with suspicion, and written whole or not at all.

A JSON object has no key twice, no NaN and no infinity. Only regular files are read: opening a FIFO
or a device may never return. What reads takes the code that its caller refuses with; what the
system does not let be written is PSG603.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from peftsurgery.errors import SurgeryError

# A rank pattern has an entry for each module at most, a fingerprint 100 bytes for each tensor.
MAX_JSON = 64 * 2**20


def read_object(file: Path, code: str) -> dict[str, Any]:
    """The JSON object in a file; refused if it is none, or holds a key twice, NaN or infinity."""
    try:
        check_regular(file)
        with file.open("rb") as stream:
            content = stream.read(MAX_JSON + 1)
        if len(content) > MAX_JSON:
            raise SurgeryError(code, f"{file} is larger than {MAX_JSON} bytes")
        return parse_object(content)
    except (OSError, ValueError, RecursionError) as error:
        raise SurgeryError(code, why_unread(file, error)) from None


def why_unread(file: Path, error: Exception) -> str:
    """A sentence on a file that could not be read: what is not there, or what is wrong with it."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        is_here = os.path.isdir(file.parent)
        return f"there is nothing at '{file}'" if is_here else absence(file.parent, file.name)
    if isinstance(error, IsADirectoryError):
        return f"'{file}' is a directory, not a file"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return f"{file} cannot be read: {reason}"


def absence(folder: Path, name: str) -> str:
    """A sentence on a file that a directory has not, or on a directory that is none."""
    if os.path.isdir(folder):
        return f"'{folder}' has no {name}"
    if os.path.lexists(folder):
        return f"'{folder}' is a file, not a directory"
    return f"there is nothing at '{folder}'"


def parse_object(content: bytes) -> dict[str, Any]:
    """The JSON object that bytes are. ValueError for none, a key twice, NaN or infinity."""
    found = json.loads(content.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def write_files(
    folder: Path, contents: Mapping[str, bytes], marker: str, code: str, what: str
) -> None:
    """Write the files of a directory that is free, empty, or already one of its kind.

    Refused with ``code`` if the place is not ``what`` it has to be: it is neither free nor empty
    nor has it a file ``marker``. PSG603 if the system refuses.
    """
    with _said_of(folder):
        if os.path.lexists(folder) and not _is_replaceable(folder, marker):
            raise SurgeryError(code, f"'{folder}' exists and is not {what}", "choose another name")
    write_whole(folder, contents)


def write_whole(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files by their names in ``folder``, in this order, or leave what is there alone.

    PSG603 if the system refuses.
    """
    places = [folder / name for name in contents]
    parts = {file: file.with_name(f".{file.name}.part-{os.getpid()}") for file in places}
    missing: list[Path] = []
    try:
        with _said_of(folder):
            missing = _missing({file.parent for file in places})
            for content, part in zip(contents.values(), parts.values(), strict=True):
                part.parent.mkdir(parents=True, exist_ok=True)
                _write(part, content)
            for file, part in parts.items():
                part.replace(file)
    finally:
        _clear(parts.values(), missing)


def remove(files: Iterable[Path]) -> None:
    """Remove files, if they are there. PSG603 if the system refuses."""
    for file in files:
        with _said_of(file):
            file.unlink(missing_ok=True)


def _write(part: Path, content: bytes) -> None:
    with part.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def _said_of(path: Path) -> Iterator[None]:
    """Say what the system refused of a path by PSG603."""
    try:
        yield
    except (OSError, ValueError) as error:  # NUL in a path is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise SurgeryError("PSG603", f"'{path}' cannot be written: {reason}") from error


def _is_replaceable(folder: Path, marker: str) -> bool:
    return folder.is_dir() and (not any(folder.iterdir()) or (folder / marker).is_file())


def _missing(folders: Iterable[Path]) -> list[Path]:
    """The directories that have to be made for these, the innermost first."""
    every = {path for folder in folders for path in (folder, *folder.parents)}
    return sorted((p for p in every if not p.exists()), key=lambda p: len(p.parts), reverse=True)


def _clear(parts: Iterable[Path], folders: Iterable[Path]) -> None:
    """Remove parts of files that did not get their place, and folders that stayed empty."""
    for part in parts:
        if os.path.isdir(part.parent):
            part.unlink(missing_ok=True)
    for folder in folders:
        if os.path.isdir(folder) and not any(folder.iterdir()):
            folder.rmdir()


def check_regular(file: Path) -> None:
    """Refuse what is there and no regular file. ValueError."""
    if file.exists() and not file.is_file():
        raise ValueError("it is not a regular file")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key '{twice:.80}' appears twice")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")
