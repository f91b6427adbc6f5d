"""Reserved words: parameter names of ``apply`` that no setting may have.

Settings may be given as keyword arguments of a function, beside its own parameters. A setting of
the name of one of those could not be given in that way, so a rule file that declares it is refused.
The function is made known by :func:`takes_settings`, which checks this list against its signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from peftsurgery.errors import SurgeryError
from peftsurgery.language.strict import position_of

Function = TypeVar("Function", bound=Callable[..., Any])

RESERVED = frozenset({"model", "rules", "name", "train", "settings", "where", "by"})


def takes_settings(function: Function) -> Function:
    """Decorate a function that takes settings as keywords: check its signature, return it.

    A TypeError where its own parameters are not the words that are reserved: the list is wrong.
    """
    own = inspect.signature(function).parameters.values()
    named = {one.name for one in own if one.kind is not inspect.Parameter.VAR_KEYWORD}
    if named != RESERVED:
        raise TypeError(f"{function.__name__} has the parameters {named}, reserved are {RESERVED}")
    return function


def check_reachable(setting: str) -> None:
    """Refuse a setting that could not be given as a keyword. PSG106."""
    if setting in RESERVED:
        raise SurgeryError(
            "PSG106",
            f"a setting cannot be called '{setting}'",
            f"applying rules takes these words for itself: {', '.join(sorted(RESERVED))}",
            position_of(setting),
        )
