"""Selection: which sites are meant, and for every other site why it is not.

A selection is a value: count it, narrow it, ask it for its :func:`verdict` on a site, check it
against what its rule expects, and only then cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from peftsurgery.anatomy import Placed
from peftsurgery.capture.copying import SharedByCopies
from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.language.clauses import (
    LACKS,
    NOBODY,
    Clause,
    address,
    compile_where,
    failures,
    is_asked_for,
    occurs,
    of_kind,
    passes,
)
from peftsurgery.language.counted import Counted
from peftsurgery.language.kinds import KINDS
from peftsurgery.language.roles import Roles
from peftsurgery.language.schema import Rule
from peftsurgery.language.where import EVERYWHERE, Where, where_of
from peftsurgery.notebook import shown, table

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, eq=False)
class Candidate:
    """A site of the rule's kind and the clauses that it failed; none if it is kept."""

    site: Placed
    failed: tuple[Clause, ...]

    @property
    def reasons(self) -> list[str]:
        """Why the site was dropped, one text for each failed clause."""
        return [clause.reason(self.site) for clause in self.failed]

    def to_dict(self) -> dict[str, Any]:
        """The verdict as ``--json`` prints it."""
        return {"site": site_name(self.site), "reasons": self.reasons}

    def __str__(self) -> str:
        return f"{site_name(self.site)}: {'; '.join(self.reasons) or 'kept'}"


@dataclass(frozen=True, eq=False)
class Selection(SharedByCopies):
    """Chosen sites, with every clause's verdict on every candidate.

    ``rule`` is the rule that chose, None for a selection that is made by hand. ``sites`` are all
    that there are in the model, ``candidates`` those of the rule's kind. ``unnarrowed`` is what the
    rule chose before a user narrowed it: what the rule expects is said of that.
    """

    name: str
    rule: Rule | None
    sites: tuple[Placed, ...]
    clauses: tuple[Clause, ...]
    candidates: tuple[Candidate, ...]
    unnarrowed: Selection | None = None

    def __iter__(self) -> Iterator[Placed]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def __bool__(self) -> bool:
        return bool(self.kept)

    @cached_property
    def kept(self) -> tuple[Placed, ...]:
        """The sites to cut at."""
        return tuple(c.site for c in self.candidates if not c.failed)

    @cached_property
    def dropped(self) -> tuple[Candidate, ...]:
        """The sites of the kind that failed a clause."""
        return tuple(c for c in self.candidates if c.failed)

    def counts(self) -> list[tuple[str, int]]:
        """How many sites survived each clause, in order; the first entry is all of the kind."""
        left = list(self.candidates)
        rows = [(self._noun, len(left))]
        for clause in self.clauses:
            left = [c for c in left if clause not in c.failed]
            rows.append((clause.text, len(left)))
        return rows

    @property
    def _noun(self) -> str:
        return "sites" if self.rule is None else f"{self.rule.kind.name} sites"

    def where(self, **clauses: Any) -> Selection:
        """Narrow the selection by the clauses that rules have under ``where``, all of which hold.

        ``role``, ``path`` (a regular expression for the whole path), ``layers`` (3, "4..") and the
        others; ``kind`` is also the kind of site (linear, attention). Raises PSG105 and PSG106 for
        what is no clause, PSG142 for a role that no site could have.
        """
        kinds = [one for one in _listed(clauses.get("kind")) if one in KINDS]
        if kinds:
            clauses = {key: value for key, value in clauses.items() if key != "kind"}
        more = compile_where(where_of(clauses, "where()"), Roles.among(self.sites))
        more = (*([of_kind(kinds)] if kinds else ()), *more)
        candidates = [
            Candidate(c.site, (*c.failed, *failures(more, c.site))) for c in self.candidates
        ]
        return replace(self, clauses=(*self.clauses, *more), candidates=tuple(candidates))

    def assert_count(self, count: int) -> Selection:
        """Check the number of sites; returns the selection. Raises PSG302 with the nearest miss."""
        if len(self) != count:
            message = f"{self.name}: {len(self)} sites are chosen, expected {count}"
            raise SurgeryError("PSG302", message, self.trail())
        return self

    def to_dict(self) -> dict[str, Any]:
        """The selection as ``--json`` prints it: its sites, and how many each clause left."""
        return {
            "name": self.name,
            "sites": [site_dict(site) for site in self.kept],
            "counts": [{"clause": text, "left": count} for text, count in self.counts()],
            "near_misses": [miss.to_dict() for miss in self.near_misses()],
        }

    def __str__(self) -> str:
        groups: dict[tuple[str, ...], list[str]] = {}
        for site in self.kept:
            name = site_name(site) or "(itself)"
            key = (site.kind, site.role or "", NUMBER.sub("*", name))
            groups.setdefault(key, []).append(name)
        lines = [f"{self.name}: {len(self)} of {len(self.candidates)} {self._noun}"]
        for (kind, role, _), names in groups.items():
            lines.append(f"{len(names):5d}  {kind}{f' {role}' if role else ''}  {joined(names)}")
        return "\n".join([*lines, *(() if self else [f"  {self.trail()}"])])

    def near_misses(self, limit: int = 3) -> list[Candidate]:
        """The dropped sites that failed the fewest clauses."""
        return sorted(self.dropped, key=lambda c: len(c.failed))[:limit]

    def _repr_html_(self) -> str:
        """What a notebook shows: the sites that are kept, and of each clause how many it left."""
        kept = [(site_name(s), s.role, s.kind, s.layer) for s in self.kept]
        dropped = [
            (site_name(c.site), "; ".join(c.reasons)) for c in self.near_misses(len(self.dropped))
        ]
        return shown(
            f"{self.name}: {len(self.kept)} of {len(self.candidates)} sites",
            table(("site", "role", "kind", "layer"), kept),
            table(("clause", "sites left"), self.counts() if self.clauses else ()),
            table(("not kept", "because"), dropped),
        )

    def trail(self) -> str:
        """The counts and the nearest miss, as errors and reports print them."""
        lines = [f"{count:5d}  {text}" for text, count in self.counts()]
        misses = self.near_misses(1)
        return "\n  ".join([*lines, *(f"nearest miss: {miss}" for miss in misses)])

    def check(self) -> None:
        """Refuse a selection that is not what the rule expects: PSG301 or PSG302.

        Narrowed by a user, what it was before must be that.
        """
        if self.unnarrowed is not None:
            return self.unnarrowed.check()
        is_left_out = any(clause.key == NOBODY for clause in self.clauses)
        complaint = None if is_left_out else self._complaint()
        if complaint is not None:
            code = "PSG302" if self.kept else "PSG301"
            raise SurgeryError(code, f"{self.name}: {complaint}", self.trail())
        return None

    @cached_property
    def counted(self) -> Counted:
        """The chosen sites with those that they are counted against."""
        besides = [clause for clause in self.clauses if clause.key not in ("role", "whole")]
        near = [c.site for c in self.candidates if not any(f in besides for f in c.failed)]
        cores = [site for site in self.sites if site.kind == "attention"]
        kind = None if self.rule is None else self.rule.kind.name
        whole = [clause for clause in self.clauses if clause.key != "whole"]
        others = [site for site in self.sites if site.kind != kind and site.attentions]
        return Counted(
            self.kept,
            near,
            [site for site in cores if passes(besides, site)],
            [clause for clause in self.clauses if clause.key == "role"],
            [site for site in others if passes(whole, site)],
        )

    def _complaint(self) -> str | None:
        if self.rule is None:
            return None
        found = self.counted.complaint(self.rule.expect)
        return found and f"matched {len(self.kept)} {self._noun}, expected {found}"


def select(
    sites: Iterable[Placed],
    rule: Rule,
    settings: Mapping[str, Any] | None = None,
    roles: Mapping[str, Where] | None = None,
    name: str = "the rule",
    matched: Mapping[str, frozenset[str]] | None = None,
    narrowing: Where = EVERYWHERE,
) -> Selection:
    """Select the sites of a model that a rule's clauses keep.

    ``roles`` are those that the rule file defines; each may use the ones before it. ``matched`` are
    the modules that earlier rules cut, by name. ``narrowing`` are clauses that a user adds: what
    the rule expects is not said of them. Raises PSG142 for a role, PSG145 for an earlier
    rule and PSG303 for a path that does not exist; what the rule expects is for
    :meth:`Selection.check` to say.
    """
    placed, values = tuple(sites), settings or {}
    known = Roles.among(placed, matched)
    for word, where in (roles or {}).items():
        known = known.extended(word, partial(passes, compile_where(where.bind(values), known)))
    where = rule.where.bind(values)
    clauses = compile_where(where, known)
    _check_paths(where, [site for site in placed if site.kind == rule.kind.name])
    chosen = _chosen(name, rule, placed, clauses)
    if not narrowing.given():
        return chosen
    narrowed = _chosen(name, rule, placed, (*clauses, *compile_where(narrowing, known)))
    return replace(narrowed, unnarrowed=chosen)


def every_site(sites: Iterable[Placed]) -> Selection:
    """Select all sites, to be narrowed."""
    placed = tuple(sites)
    return Selection("sites", None, placed, (), tuple(Candidate(site, ()) for site in placed))


def verdict(selection: Selection, path: str) -> str:
    """Explain why a module or parameter was kept or dropped, one line for each of its sites."""
    at = [c for c in selection.candidates if path in (c.site.module, c.site.parameter)]
    if at:
        return "\n".join(str(candidate) for candidate in at)
    others = [s for s in selection.sites if path in (s.module, s.parameter)]
    if others:
        kinds = ", ".join(sorted({site.kind for site in others}))
        return f"{path}: it is {kinds}, and the rule matches {selection._noun}"
    known = {address(site) for site in selection.sites}
    raise SurgeryError("PSG303", f"there is no site at '{path}'", did_you_mean(path, known))


def site_name(site: Placed) -> str:
    """A site as messages name it: its address, and which part of a fused weight it is."""
    label = f"[{site.site.label}]" if site.site.label else ""
    return f"{address(site)}{label}"


def site_dict(site: Placed) -> dict[str, Any]:
    """A site as ``--json`` prints it."""
    named = ("kind", "role", "module", "parameter")
    return {
        **{key: getattr(site, key) for key in named},
        "slice": site.site.label,
        **{key: getattr(site, key) for key in ("block", "layer", "type")},
        "facts": dict(site.facts),
    }


def joined(names: Sequence[str]) -> str:
    """Join texts that differ only in numbers between dots: ``layers.{0..3}.k_proj``."""
    spans = map(_span, zip(*map(NUMBER.findall, names), strict=True))
    return NUMBER.sub(lambda _: next(spans), names[0])


def _span(numbers: Iterable[str]) -> str:
    """Numbers, each once, as a range if they are one; few of them otherwise."""
    known = list(dict.fromkeys(numbers))
    if len(known) == 1:
        return known[0]
    whole = [int(number) for number in known]
    if whole == list(range(whole[0], whole[0] + len(whole))):
        return f"{{{whole[0]}..{whole[-1]}}}"
    return f"{{{','.join(known[:4])}{',…' if len(known) > 4 else ''}}}"


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple | set) else [value]


def _chosen(
    name: str, rule: Rule, sites: tuple[Placed, ...], clauses: tuple[Clause, ...]
) -> Selection:
    """Apply clauses to the sites of a rule's kind; slices give way to chosen wholes."""
    near = [site for site in sites if site.kind == rule.kind.name]
    if rule.pattern is not None and any(LACKS in site.facts for site in near):
        clauses = (occurs(rule.pattern), *clauses)
    plain = is_asked_for(clauses)
    if plain is not None and any(not plain.holds(site) for site in near):
        clauses = (plain, *clauses)
    candidates = [Candidate(site, tuple(failures(clauses, site))) for site in near]
    covered = _covered(candidates)
    if covered is not None:
        clauses = (*clauses, covered)
        candidates = [
            c if c.failed or covered.holds(c.site) else replace(c, failed=(covered,))
            for c in candidates
        ]
    return Selection(name, rule, sites, clauses, tuple(candidates))


def _check_paths(where: Where, sites: list[Placed]) -> None:
    known = {address(site) for site in sites}
    for path in where.paths or ():
        if path not in known:
            message = f"no site of this kind is at '{path}'"
            raise SurgeryError("PSG303", message, did_you_mean(path, known) if known else None)


def _covered(candidates: list[Candidate]) -> Clause | None:
    """Clause that drops slices of fused weights whose whole is chosen too.

    None if there are none.
    """
    wholes = {(c.site.block, id(c.site.site)) for c in candidates if not c.failed}

    def holds(site: Placed) -> bool:
        return site.site.whole is None or (site.block, id(site.site.whole)) not in wholes

    if all(holds(c.site) for c in candidates if not c.failed):
        return None
    text = "parts give way to the whole"
    return Clause("whole", text, holds, lambda site: "the whole fused weight is chosen already")
