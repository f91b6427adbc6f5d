"""Outputs that are written whole or not at all.

It is written to a hidden sibling of what was asked for, which takes the name when all has succeeded
and is removed when it has not. What is read is never touched: see :mod:`peftsurgery.places`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from peftsurgery.errors import SurgeryError
from peftsurgery.places import check_apart


@contextmanager
def fresh(out: Path, inputs: Iterable[str | Path] = (), force: bool = False) -> Iterator[Path]:
    """A path beside ``out`` to write a file or directory to; it becomes ``out`` at the end.

    What was asked for is checked at the start, and at the end again: the body may take hours, and
    something else may have come to be there. Raises what :func:`check_free` raises.
    """
    inputs = list(inputs)
    check_free(out, inputs, force)
    part = _unused(out.absolute())
    try:
        yield part
        check_free(out, inputs, force)
        _put(part, out)
    finally:
        _remove(part)


def check_free(out: Path, inputs: Iterable[str | Path] = (), force: bool = False) -> None:
    """Refuse an output that must not be written.

    Raises PSG601 if ``out`` exists (with ``force``: if it is neither a file nor a model's
    directory), PSG602 if it is, holds or lies in one of ``inputs`` or what those were made for,
    whatever ``force`` says, PSG603 if it has no parent.
    """
    check_apart(out, inputs)
    if os.path.lexists(out):
        if not force:
            hint = "choose another name or --force"
            raise SurgeryError("PSG601", f"'{out}' exists already", hint)
        _check_replaceable(out)
    if not out.absolute().parent.is_dir():
        raise SurgeryError("PSG603", f"'{out.parent}' is not a directory")


def _unused(out: Path) -> Path:
    """A hidden name beside ``out`` that nothing has."""
    names = (f".{out.name}.part-{os.getpid()}{'-' * n}" for n in count())
    return next(p for name in names if not os.path.lexists(p := out.with_name(name)))


def _put(part: Path, out: Path) -> None:
    """Give ``part`` the name ``out``; what had it goes only after that has worked."""
    if not os.path.lexists(out):
        part.rename(out)
        return
    old = part.with_name(f"{part.name}.old")
    out.rename(old)
    try:
        part.rename(out)
    except OSError:
        old.rename(out)
        raise
    _remove(old)


def _check_replaceable(out: Path) -> None:
    """Only what a command of this kind can have written is replaced, never a home directory."""
    if out.is_symlink() or not (out.is_dir() or out.is_file()):
        raise SurgeryError("PSG601", f"'{out}' is neither a file nor a directory")
    known = ["config.json", "surgery.json", "adapter_config.json", "adapter_setup.json"]
    known.append("model.safetensors")  # all that a plain module has
    if out.is_dir() and any(out.iterdir()) and not any((out / name).is_file() for name in known):
        message = f"'{out}' is not a model's directory, so it is not replaced"
        raise SurgeryError("PSG601", message, "choose another name")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
