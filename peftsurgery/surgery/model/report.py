"""Reports: what every rule matched, what it added, and what it nearly matched and why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from peftsurgery.anatomy.survey import unread_cores
from peftsurgery.capture import Capture
from peftsurgery.language.counted import Counted
from peftsurgery.language.selection import NUMBER, Selection, joined
from peftsurgery.notebook import notes, shown, table
from peftsurgery.surgery.model.coverage import Coverage
from peftsurgery.surgery.plan.cut import Cut
from peftsurgery.surgery.plan.plan import Plan


@dataclass(frozen=True, eq=False)
class Report:
    """Report of an operated model: matches, parameters added, coverage and near misses.

    ``adapters`` says of each whether it is active, ``added`` the shape of every parameter that
    rules added; of ``total`` elements of parameters, ``trainable`` are trained;
    ``lost`` is, by adapter, the share of the changes it was combined of that it does not have.
    """

    plan: Plan
    adapters: dict[str, bool]
    added: dict[str, list[int]]
    trainable: int
    total: int
    notes: tuple[str, ...] = ()
    lost: dict[str, float] = field(default_factory=dict)

    @cached_property
    def coverage(self) -> Coverage:
        """How much of the model was matched, by role and by kind."""
        sites = self.plan.selections[-1].sites if self.plan.selections else ()
        return Coverage.of(sites, [cut.placed for cut in self.plan.cuts])

    @property
    def matches(self) -> list[dict[str, Any]]:
        """One entry for each site that was cut, in the model's order for each rule."""
        return [_match(cut) for cut in self.plan.cuts]

    @property
    def near_misses(self) -> list[dict[str, Any]]:
        """The sites that each rule nearly matched, with the reasons."""
        chosen = ((each.name, miss) for each in self.plan.selections for miss in each.near_misses())
        return [{"rule": name, **miss.to_dict()} for name, miss in chosen]

    @property
    def unprojected(self) -> list[dict[str, Any]]:
        """The roles that a rule asks for and an attention core has no projection of its own for."""
        return self._at_cores(lambda counted: counted.unprojected)

    @property
    def elsewhere(self) -> list[dict[str, Any]]:
        """The roles that a rule asks for and that sites of other kinds have at attention cores."""
        return self._at_cores(lambda counted: counted.elsewhere)

    def _at_cores(self, of: Callable[[Counted], Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Roles by attention core and rule, as the counts of each rule have them."""
        return [
            {"rule": each.name, "attention": core, "roles": roles}
            for each in self.plan.selections
            for core, roles in of(each.counted).items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """The report as ``--json`` prints it."""
        return {
            "matches": self.matches,
            **self.coverage.to_dict(),
            "added": self.added,
            "active": [name for name, active in self.adapters.items() if active],
            "trainable": self.trainable,
            "total": self.total,
            "near_misses": self.near_misses,
            "unprojected": self.unprojected,
            "elsewhere": self.elsewhere,
            "notes": list(self.notes),
            "lost": self.lost,
        }

    def _repr_html_(self) -> str:
        """What a notebook shows: every cut, how much of each role was reached, and near misses."""
        matches = [
            (m["adapter"], m["role"], m["parameter"] or m["module"], ", ".join(m["added"]))
            for m in self.matches
        ]
        shares = [(name, f"{share}") for name, share in self.coverage.roles.items()]
        misses = [(m["site"], "; ".join(m["reasons"])) for m in self.near_misses]
        return shown(
            f"trainable: {self.trainable:,} of {self.total:,} parameters",
            table(("adapter", "role", "site", "added"), matches),
            table(("role", "matched"), shares),
            table(("nearly matched", "why not"), misses),
            notes(self.notes),
        )

    def __str__(self) -> str:
        lines = [line for chosen in self.plan.selections for line in _lines(chosen)]
        share = 100 * self.trainable / max(self.total, 1)
        if len(self.adapters) > 1 or not all(self.adapters.values()):
            shown = (n if active else f"{n} (inactive)" for n, active in self.adapters.items())
            lines.append(f"adapters: {', '.join(shown)}")
        lines += self.coverage.lines() if self.plan.selections else []
        lines.append(f"trainable: {self.trainable:,} of {self.total:,} parameters ({share:.2f} %)")
        lines += [f"note: {note}" for note in self.notes]
        for name, lost in self.lost.items():
            lines.append(f"note: '{name}' lacks {lost:.2%} of the change that it was made of")
        return "\n".join(lines)


def counted(parameters: Iterable[nn.Parameter], resting: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Element counts of the trained parameters, without resting ones, and of all."""
    every, rest = list(parameters), {id(parameter) for parameter in resting}
    trained = (p.numel() for p in every if p.requires_grad and id(p) not in rest)
    return sum(trained), sum(parameter.numel() for parameter in every)


def capture_notes(capture: Capture) -> list[str]:
    """What was specialised when a model was captured, and what no rule can reach."""
    unread = (f"the attention core in '{module}' is no site" for module in unread_cores(capture))
    return [*capture.notes, *unread]


def _match(cut: Cut) -> dict[str, Any]:
    placed = cut.placed
    part = placed.slice
    return {
        "rule": cut.operation.file.name,
        "adapter": cut.operation.name,
        "role": placed.role,
        "module": placed.module,
        "parameter": placed.parameter,
        "slice": None if part is None else {"part": placed.site.label, **asdict(part)},
        "block": placed.block,
        "added": list(cut.parameters.values()),
    }


def _lines(selection: Selection) -> list[str]:
    """A rule's matches counted by role, and its nearest misses."""
    roles = Counter(site.role or site.kind for site in selection.kept)
    counted = ", ".join(f"{count} {role}" for role, count in roles.items())
    lines = [f"{selection.name}: {len(selection.kept)} sites ({counted})"]
    lines += [f"  not {text}" for text in _folded(selection)]
    lent = [
        f"{core.rpartition(':')[0]} has no projection of its own for {' and '.join(roles)}"
        for core, roles in selection.counted.unprojected.items()
    ]
    lent += [
        f"{core.rpartition(':')[0]} has {kind} for {role}, which this rule does not match"
        for core, roles in selection.counted.elsewhere.items()
        for kind, role in _by_kind(roles)
    ]
    return lines + [f"  {joined(texts)}" for texts in _alike(lent)]


def _by_kind(roles: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Each kind of site with the roles that it has, in words."""
    for kind in dict.fromkeys(roles.values()):
        yield kind, " and ".join(role for role, other in roles.items() if other == kind)


def _folded(selection: Selection, limit: int = 2) -> list[str]:
    """The nearest misses, those of equal layers as one: ``layers.{0,1,2}.k_proj: ...``."""
    misses = map(str, selection.near_misses(len(selection.dropped)))
    return [joined(texts) for texts in _alike(misses)[:limit]]


def _alike(texts: Iterable[str]) -> list[list[str]]:
    """Texts in groups of those that differ in the numbers of layers alone."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(NUMBER.sub("*", text), []).append(text)
    return list(groups.values())
