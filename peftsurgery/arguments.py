"""Arguments: what a public function is given is checked against its own annotations.

A wrong argument is then refused where it is given, by its name, and not somewhere inside.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from peftsurgery.errors import SurgeryError

_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
Function = TypeVar("Function", bound=Callable[..., Any])


def checked_but(*own: str) -> Callable[[Function], Function]:
    """What :func:`checked` makes of a function that checks the arguments ``own`` by itself."""
    return functools.partial(checked, own=own)


def checked(function: Function, *, own: tuple[str, ...] = ()) -> Function:
    """A function that refuses arguments of other types than it is annotated with. PSG904.

    Unions, literals and classes are checked, and what containers are, not what they hold.
    """
    signature = inspect.signature(function)
    known: list[dict[str, Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not known:  # at the first call: what annotations name is imported by then
            known.append(get_type_hints(function))
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            message = f"{function.__qualname__}: {error}"
            raise SurgeryError("PSG904", message, f"it takes {signature}") from None
        for name, value in given.items():
            kind = signature.parameters[name].kind
            if name not in own and kind not in _REST:
                _check(function.__qualname__, name, value, known[0].get(name, Any))
        return function(*args, **kwargs)

    return cast("Function", call)


def _check(function: str, name: str, value: Any, annotation: Any) -> None:
    choices = list(_choices(annotation))
    if any(_fits(value, choice) for choice in choices):
        return
    wanted = " or ".join(dict.fromkeys(_shown(choice) for choice in choices))
    given = "None" if value is None else f"a {type(value).__name__}"
    if isinstance(value, str) and all(isinstance(c, _Value) for c in choices):
        given = repr(value)[:60]
    about = (_about(choice) for choice in choices if isinstance(choice, type))
    hint = "; ".join(text for text in about if text) or None
    raise SurgeryError("PSG904", f"{function}({name}) takes {wanted}, not {given}", hint)


class _Value:
    """One of the values of a literal."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _choices(annotation: Any) -> Iterable[Any]:
    """What an annotation allows, one by one."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _choices(part)
    elif origin is Literal:
        yield from map(_Value, get_args(annotation))
    else:
        yield annotation if origin is None else origin


def _fits(value: Any, choice: Any) -> bool:
    if isinstance(choice, _Value):
        return bool(value == choice.value)
    if choice is float:
        choice = (int, float)
    if choice is Any or not isinstance(choice, type | tuple):
        return True
    if isinstance(value, bool) and choice in (int, (int, float)):
        return False
    return isinstance(value, choice)


def _shown(choice: Any) -> str:
    if isinstance(choice, _Value):
        return repr(choice.value)
    return "None" if choice is type(None) else str(getattr(choice, "__name__", choice))


def _about(choice: type) -> str:
    """What a class of ours is, by the first line of its docstring."""
    if not choice.__module__.startswith(f"{__package__}."):
        return ""
    return f"{choice.__name__}: {(inspect.getdoc(choice) or '').partition(chr(10))[0]}"
