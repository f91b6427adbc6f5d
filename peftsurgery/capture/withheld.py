"""Arguments of a cache update beside keys and values, which a capture does not pass on.

Some models give their cache the keyword arguments of the call as well, for caches that choose what
to keep. Those of transformers do not look at them. A cache that does look is refused there and
then: it would decide on other values than the original's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from peftsurgery.errors import SurgeryError

POSITIONAL = "*"  # stands for the name of an argument that is given by position


def refused(why: str) -> SurgeryError:
    """The error for a model or a cache of another kind."""
    message = f"the cache cannot be left to its owner: {why}"
    return SurgeryError("PSG210", message, "generate with use_cache=False")


def names_of(more: Sequence[Any], named: Mapping[str, Any]) -> str:
    """The arguments beside keys and values by name, as one text. PSG210 unless all are dicts."""
    if not all(isinstance(value, dict) for value in (*more, *named.values())):
        raise refused("it gives its cache more than keys and values")
    return ",".join([*(POSITIONAL for _ in more), *named])


def stand_ins(names: str) -> tuple[list[Any], dict[str, Any]]:
    """Stand-ins for those arguments, positional and named, that raise PSG210 when read."""
    given = names.split(",") if names else []
    positional = [Withheld() for name in given if name == POSITIONAL]
    return positional, {name: Withheld() for name in given if name != POSITIONAL}


class Withheld(dict[str, Any]):
    """A dictionary that refuses to be read, with PSG210."""

    def _refuse(self, *args: Any) -> NoReturn:
        raise refused("it reads what the model tells it beside keys and values")

    __getitem__ = __iter__ = __len__ = __bool__ = __contains__ = __eq__ = __or__ = _refuse
    get = items = keys = values = pop = copy = setdefault = _refuse
