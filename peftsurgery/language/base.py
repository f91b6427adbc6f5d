"""A rule file that stands on another says only what is its own.

    base: lora          a shipped name, or a path as seen from the file; or a list of them
    with, let, roles, flat, checkpoint      are laid over the base's
    where               is laid over the clauses of every rule of the base
    change: [...]       is laid over the base's rules, in order; null takes one out
    without: [...]      settings of the base that no expression reads any more
    rules: [...]        are further rules, after the base's

What is laid over a mapping gives it keys, mapping by mapping; anything else takes the place of what
the base has, and null takes that out (but a setting may be null). A setting of the base that
nothing of the whole reads any more is none of the file's. If an expression of the base read it, the
file has to say so: the one that took its place may have it misspelt.

Of several bases the rules come one after another, and ``change`` counts through all of them. What
has one name in two bases, a setting, a number or a role, is one thing: where they say different
things of it, the file has to say which. ``flat`` and ``checkpoint`` are about one method as a
whole, so those of several bases are not taken over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from peftsurgery.errors import SurgeryError
from peftsurgery.language.document import Document, Path
from peftsurgery.language.position import Position

_NAMED = ("with", "let", "roles")
_NAME = re.compile(r"\$?[A-Za-z_]\w*")


class StandsOn(NamedTuple):
    """What only a file that stands on another says."""

    base: Sequence[str]
    where: Mapping[str, Any] = MappingProxyType({})
    change: Sequence[Mapping[str, Any] | None] = ()
    without: Sequence[str] = ()


KEYS = StandsOn._fields
"""The keys that say it, which the whole has no more."""


def joined(bases: Sequence[Document], own: Document) -> Document:
    """Put the bases of a file one after another, as one base.

    Each stands by itself. PSG118 where two of them say different things by one name, and the file
    does not say which it is.
    """
    if len(bases) == 1:
        return bases[0]
    data: dict[str, Any] = {**{key: {} for key in _NAMED}, "rules": []}
    positions: dict[Path, Position] = {}
    for number, base in enumerate(bases):
        for key, name, value in _named(base):
            known = data[key].setdefault(name, value)
            if (type(known), known) != (type(value), value) and name not in _keys(own, key):
                message = f"{key}: {name} is {known!r} in a base, and {value!r} in this one"
                where = str(own.position(("base", number)))
                raise SurgeryError("PSG118", message, f"say under `{key}:` which it is", where)
        rules, before = base.data["rules"], len(data["rules"])
        positions |= _moved(base, {rule: rule + before for rule in range(len(rules))})
        data["rules"] += rules
    return Document(data, positions)


def _named(base: Document) -> Iterator[tuple[str, str, Any]]:
    """What a base gives names to: under which key, the name, and what it stands for."""
    for key in _NAMED:
        for name, value in base.data.get(key, {}).items():
            yield key, name, value


def _keys(document: Document, key: str) -> Iterable[str]:
    found = document.data.get(key)
    return found if isinstance(found, Mapping) else ()


def laid_over(base: Document, own: Document, said: StandsOn) -> Document:
    """Lay a file over its base; every value keeps its position.

    PSG109 for a change of a rule that the base does not have.
    """
    rules = base.data.get("rules")
    rules, more = rules if isinstance(rules, list) else [], own.data.get("rules", [])
    if len(said.change) > len(rules):
        position = str(own.position(("change", len(rules))))
        names = " and ".join(f"'{name}'" for name in said.base)
        message = f"no more than {len(rules)} rule{'s' * (len(rules) != 1)} to change in {names}"
        raise SurgeryError("PSG109", message, "further rules go under `rules:`", position)
    changes = [*said.change, *({} for _ in rules[len(said.change) :])]
    wheres = {"where": said.where} if said.where else {}
    kept = [number for number, change in enumerate(changes) if change is not None]
    changed = [_laid(_laid(rules[number], wheres), changes[number]) for number in kept]
    under = {key: value for key, value in base.data.items() if key not in ("name", "about")}
    over = {key: value for key, value in own.data.items() if key not in KEYS}
    over["rules"] = [*changed, *more] if isinstance(more, list) else more
    data = _laid(under, over)
    if isinstance(under.get("with"), Mapping) and isinstance(mine := over.get("with", {}), Mapping):
        read = {*mine, *(_settings_read(data) | _read(under)).difference(said.without)}
        data["with"] = {n: value for n, value in {**under["with"], **mine}.items() if n in read}
    places = {number: place for place, number in enumerate(kept)}
    own_positions = {
        moved: position
        for path, position in own.positions.items()
        for moved in _whole_paths(path, places)
    }
    return Document(data, _moved(base, places) | own_positions)


def _laid(under: Any, over: Any) -> Any:
    """One value laid over another."""
    if not (isinstance(under, Mapping) and isinstance(over, Mapping)):
        return over
    out = {key for key, value in over.items() if value is None and key in under}
    kept = {key: value for key, value in under.items() if key not in over}
    order = dict.fromkeys([*under, *over])
    laid = {key: _laid(under.get(key), value) for key, value in over.items()} | kept
    return {key: laid[key] for key in order if key not in out}


def check_read(own: Document, whole: Document) -> None:
    """Refuse a setting of a file's base that expressions read there, and nothing does here. PSG117.

    ``whole`` is the file laid over its base.
    """
    known = {*_settings_read(whole.data), *own.data.get("with", {})}
    for name in whole.data.get("with", {}) if "base" in own.data else ():
        if name not in known:
            message = f"nothing reads '{name}' any more, a setting of its base"
            hint = f"correct what took its place, or say `without: {name}`"
            raise SurgeryError("PSG117", message, hint, str(own.position(("base",))))


def _settings_read(data: Mapping[str, Any]) -> set[str]:
    """The names that expressions and clauses of a file read, whatever they are the names of."""
    return {name.lstrip("$") for name in _read(data)}


def _read(data: Mapping[str, Any]) -> set[str]:
    """Every name in the texts of a file's rules; those of settings in clauses with their $."""
    texts = (value for key, value in data.items() if key not in ("name", "about", "with"))
    return {name for value in texts for name in _names(value)}


def _names(value: Any) -> Iterator[str]:
    """Every name in the texts of a value."""
    if isinstance(value, str):
        yield from _NAME.findall(value)
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _names(item)


def _moved(base: Document, places: Mapping[int, int]) -> dict[Path, Position]:
    """Positions in a base by the paths in the whole, where its rules have these places."""
    moved = {}
    for path, position in base.positions.items():
        match path:
            case ("rules", int(number), *rest):
                if number in places:
                    moved["rules", places[number], *rest] = position
            case _:
                moved[path] = position
    return moved


def _whole_paths(path: Path, places: Mapping[int, int]) -> Iterator[Path]:
    """Where what a file says at ``path`` is in the whole, if its base's rules have these places."""
    match path:
        case ("change", int(number), *rest):
            if number in places:
                yield ("rules", places[number], *rest)
        case ("change",):
            yield from (("rules",), ("rules", 0))
        case ("change", *rest):
            yield ("rules", 0, *rest)
        case ("where", *rest):
            yield from (("rules", place, "where", *rest) for place in places.values())
        case ("rules", int(number), *rest):
            yield ("rules", len(places) + number, *rest)
        case _:
            yield path
