"""Clauses: the tests of a ``where``, each of which can say why a site fails it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from peftsurgery.anatomy import Placed
from peftsurgery.language.expression import Expression
from peftsurgery.language.paths import full_match
from peftsurgery.language.position import position_of
from peftsurgery.language.roles import Roles
from peftsurgery.language.where import Where, layer_range


@dataclass(frozen=True)
class Clause:
    """One test: its key in ``where``, its text, and for a site that fails, what the site has."""

    key: str
    text: str
    holds: Callable[[Placed], bool]
    reason: Callable[[Placed], str]


LACKS = "lacks"
"""The fact of a site that is nearly an occurrence of a pattern: what it lacks."""

# The key of the clause for `role: []`: a setting left the rule out, and nothing is to be matched.
NOBODY = "nobody"

ASKING = frozenset({"role", "path", "paths", "op", "any"})
"""The keys of clauses that a convolution is a linear to."""

_SHAPES: Mapping[str, tuple[str, ...]] = {
    "linear": ("out", "in"),
    "experts": ("experts", "out", "in"),
    "embedding": ("in", "out"),
    "norm": ("width",),
}


def compile_where(where: Where, roles: Roles) -> tuple[Clause, ...]:
    """The clauses of a ``where`` whose settings are bound. Raises PSG141, PSG142."""
    return tuple(_clauses(where, roles))


def occurs(pattern: Expression) -> Clause:
    """The clause that a site is an occurrence of a pattern, and not the nearest miss of it."""
    text = f"pattern: {pattern}"
    return Clause("pattern", text, lambda s: LACKS not in s.facts, lambda s: str(s.facts[LACKS]))


def of_kind(kinds: Iterable[str]) -> Clause:
    """The clause that a site is of one of these kinds: linear, attention, ..."""
    return _choice("kind of site", kinds, lambda site: site.kind)


def is_asked_for(clauses: Iterable[Clause]) -> Clause | None:
    """The clause that a linear is no convolution, unless clauses ask for roles or places.

    A convolution of single taps is a linear to who asks for its role, not to who asks for linears.
    """
    if not ASKING.isdisjoint(clause.key for clause in clauses):
        return None
    reason = "it is a convolution: only rules that ask for roles or paths take it for a linear"
    return Clause(
        "asked for", "no convolution", lambda s: "pointwise" not in s.facts, lambda s: reason
    )


def address(site: Placed) -> str:
    """Text that ``path`` matches: a module's path, or a bare parameter's name."""
    if site.kind == "parameter" and site.parameter is not None:
        return site.parameter
    return site.module


def _clauses(where: Where, roles: Roles) -> Iterator[Clause]:
    if where.role is not None and not where.role:
        yield Clause(
            NOBODY, "no role is asked for", lambda s: False, lambda s: "no role is asked for"
        )
    elif where.role is not None:
        for name in where.role:
            roles.check(name, position_of(name))
        yield _choice("role", where.role, lambda site: roles.of(site), glob=True)
    if where.path is not None:
        match = full_match(where.path, position_of(where.path))
        text = f"path matches {where.path}"
        yield Clause(
            "path",
            text,
            lambda s: match(address(s)),
            lambda s: f"'{address(s)}' is not what {text}",
        )
    yield from _plain(where)
    if where.layers is not None:
        yield _layers(where.layers)
    if where.shape is not None:
        yield _shape(where.shape)
    if where.matched is not None:
        yield _matched(where.matched, roles)
    for name, value in (where.facts or {}).items():
        yield _fact(name, value)
    yield from _combined(where, roles)


def _plain(where: Where) -> Iterator[Clause]:
    """The clauses that compare one property of a site with a list of names."""
    properties: dict[str, Callable[[Placed], Any]] = {
        "paths": address,
        "type": lambda site: site.type,
        "op": lambda site: site.facts.get("op"),
        "kind": lambda site: site.facts.get("kind"),
        "after": lambda site: site.facts.get("after"),
        "tower": lambda site: site.facts.get("tower"),
        "block": lambda site: site.block,
        "dtype": lambda site: str(site.facts.get("dtype", "unknown")).removeprefix("torch."),
    }
    for key, read in properties.items():
        names = getattr(where, key)
        if names is not None:
            yield _choice(key, names, read, glob=key == "block")


def _choice(
    key: str, names: Iterable[str], read: Callable[[Placed], Any], glob: bool = False
) -> Clause:
    wanted = tuple(str(name) for name in names)
    exact = frozenset(wanted)

    def values(site: Placed) -> list[str]:
        value = read(site)
        items = value if isinstance(value, list | tuple | set | frozenset) else [value]
        return [str(item) for item in items if item is not None]

    def holds(site: Placed) -> bool:
        found = values(site)
        if not exact.isdisjoint(found):
            return True
        return glob and any(fnmatchcase(value, name) for value in found for name in wanted)

    shown = ", ".join(wanted[:6]) + (f" and {len(wanted) - 6} more" if len(wanted) > 6 else "")
    choice = f"one of {shown}" if len(wanted) > 1 else shown

    def reason(site: Placed) -> str:
        return f"{key} is {', '.join(values(site)) or 'unknown'}, not {choice}"

    return Clause(key, f"{key}: {shown}", holds, reason)


def _layers(items: Iterable[int | str]) -> Clause:
    ranges = [layer_range(item) for item in items]
    text = "layers: " + ", ".join(str(item) for item in items)

    def holds(site: Placed) -> bool:
        layer = site.layer
        return layer is not None and any(low <= layer <= high for low, high in ranges)

    def reason(site: Placed) -> str:
        here = "not in a layer" if site.layer is None else f"in layer {site.layer}"
        return f"it is {here} ({text})"

    return Clause("layers", text, holds, reason)


def _shape(wanted: tuple[int | None, ...]) -> Clause:
    text = ", ".join("any" if size is None else str(size) for size in wanted)

    def fits(shape: list[int] | None) -> bool:
        if shape is None or len(shape) != len(wanted):
            return False
        return all(w is None or w == s for w, s in zip(wanted, shape, strict=True))

    return _is("shape", f"[{text}]", weight_shape, fits)


def weight_shape(site: Placed) -> list[int] | None:
    """The shape of a site's weight as rules see it, (out, in) for a linear; None if it has none."""
    facts, sizes = site.facts, _SHAPES.get(site.kind, ())
    if "shape" in facts:
        return [int(size) for size in facts["shape"]]
    if site.kind == "conv":
        return [facts["out"], facts["in"] // facts["groups"], *facts["kernel"]]
    is_known = sizes and all(size in facts for size in sizes)
    return [int(facts[size]) for size in sizes] if is_known else None


def _matched(names: Iterable[str], roles: Roles) -> Clause:
    modules = frozenset().union(*(roles.cut_by(name, position_of(name)) for name in names))
    shown = " or ".join(names)
    return Clause(
        "matched",
        f"matched: {shown}",
        lambda site: site.module in modules,
        lambda site: f"{shown} did not cut '{site.module}'",
    )


def _fact(name: str, value: Any) -> Clause:
    return _is(name, str(value), lambda s: s.facts.get(name), lambda found: bool(found == value))


def _is(
    key: str, wanted: str, read: Callable[[Placed], Any], fits: Callable[[Any], bool]
) -> Clause:
    """The clause that what is read of a site is the wanted."""
    text, holds = f"{key}: {wanted}", lambda site: fits(read(site))
    return Clause(key, text, holds, lambda site: f"{key} is {read(site)}, not {wanted}")


def _combined(where: Where, roles: Roles) -> Iterator[Clause]:
    """The clauses made of other clauses."""
    if where.all is not None:
        yield from (clause for part in where.all for clause in _clauses(part, roles))
    if where.any is not None:
        yield _any([compile_where(part, roles) for part in where.any])
    if where.not_ is not None:
        inner = compile_where(where.not_, roles)
        text = f"not ({clauses_in_words(inner)})"
        yield Clause("not", text, lambda s: not passes(inner, s), lambda s: f"it is {text[4:]}")
    for key in ("feeds", "fed_by"):
        relation = getattr(where, key)
        if relation is not None:
            yield _relation(key, compile_where(relation, roles))


def _any(parts: list[tuple[Clause, ...]]) -> Clause:
    text = " or ".join(f"({clauses_in_words(part)})" for part in parts)

    def reason(site: Placed) -> str:
        return "; ".join(failures(part, site)[0].reason(site) for part in parts) or "no alternative"

    return Clause("any", text, lambda site: any(passes(part, site) for part in parts), reason)


def _relation(key: str, inner: tuple[Clause, ...]) -> Clause:
    def others(site: Placed) -> Iterable[Placed]:
        return site.feeds if key == "feeds" else site.fed_by

    def reason(site: Placed) -> str:
        names = [f"{address(other)} ({other.role or other.kind})" for other in others(site)]
        return f"{key} {', '.join(names) or 'nothing'}, none with {clauses_in_words(inner)}"

    text = f"{key} ({clauses_in_words(inner)})"
    return Clause(key, text, lambda s: any(passes(inner, o) for o in others(s)), reason)


def passes(clauses: Iterable[Clause], site: Placed) -> bool:
    """Whether a site satisfies every clause."""
    return all(clause.holds(site) for clause in clauses)


def failures(clauses: Iterable[Clause], site: Placed) -> list[Clause]:
    """The clauses that a site fails."""
    return [clause for clause in clauses if not clause.holds(site)]


def clauses_in_words(clauses: Iterable[Clause]) -> str:
    """Clauses in words."""
    return " and ".join(clause.text for clause in clauses) or "anything"
