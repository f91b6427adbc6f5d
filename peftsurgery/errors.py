"""Coded errors: every way an operation can be refused, and what to do about it.

A :class:`SurgeryError` names the thing that is wrong and, where there is one, the nearest right
one. Its code (``PSG101``) is stable; ``peftsurgery explain PSG101`` prints the entry of
:data:`CODES`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from peftsurgery.codes import CODES


class SurgeryError(Exception):
    """Coded error: ``code`` (PSG123), what is wrong, where, and a hint if there is one.

    ``peftsurgery explain CODE`` tells more of each code.
    """

    def __init__(
        self, code: str, message: str, hint: str | None = None, where: str | None = None
    ) -> None:
        if code not in CODES:
            raise KeyError(f"{code} is not in the catalogue of error codes")
        self.code, self.message, self.hint, self.where = code, message, hint, where
        super().__init__(code, message, hint, where)

    @property
    def exit_code(self) -> int:
        """The exit code a command ends with when this error reaches it."""
        return CODES[self.code].exit_code

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        hint = f"\n  {self.hint}" if self.hint else ""
        return f"{self.code}: {place}{self.message}{hint}"

    def to_dict(self) -> dict[str, Any]:
        """The error as ``--json`` prints it."""
        return {
            "error": {
                "code": self.code,
                "title": CODES[self.code].title,
                "message": self.message,
                "hint": self.hint,
                "where": self.where,
            }
        }


def first_line(error: BaseException | None) -> str:
    """What an exception of torch or transformers says first, for use inside a message of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    return (first or type(error).__name__)[:300]


def check_argument(name: str, value: Any, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Refuse an argument that is of none of ``kinds``, which are what ``wanted`` says. PSG904."""
    if not isinstance(value, kinds):
        given = "None" if value is None else f"a {type(value).__name__}"
        raise SurgeryError("PSG904", f"{name} takes {wanted}, not {given}")


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like ``name``, or None if none is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known words, or all of them when none is near."""
    known = sorted(known)
    return nearest(name, known) or f"known here: {', '.join(known)}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """A hint that names the nearest known words, or None when none is near.

    Near are the one that is most like it, which comes first, and those of which it is a part.
    """
    known = sorted(known)
    holding = [word for word in known if name and name in word and len(name) > 2]
    near = list(dict.fromkeys([*filter(None, [closest(name, known)]), *holding]))
    if len(near) > 1:
        return f"did you mean '{near[0]}'? or one of {', '.join(near[1:])}?"
    return f"did you mean '{near[0]}'?" if near else None
