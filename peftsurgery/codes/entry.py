"""An entry of the catalogue of error codes, and the exit codes of commands."""

from __future__ import annotations

from dataclasses import dataclass

NO_MATCH, USAGE, BAD_INPUT, UNVERIFIED = 1, 2, 3, 4


@dataclass(frozen=True)
class CodeInfo:
    """What a code means: a title, an explanation for the reader, and the exit code of a command."""

    title: str
    explanation: str
    exit_code: int = BAD_INPUT
