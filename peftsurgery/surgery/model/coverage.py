"""Coverage: how much of a model the rules reached, by role and by kind, and what none can reach."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peftsurgery.anatomy import Placed

WEIGHTS = ("linear", "experts", "embedding", "conv")
SHOWN = 4  # how many parameters a report names
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


@dataclass(frozen=True)
class Matched:
    """How many sites were cut, of how many there are."""

    matched: int
    of: int

    def __str__(self) -> str:
        return f"{self.matched} of {self.of}"


@dataclass(frozen=True)
class CoveredLayers:
    """Layers of one stack that are covered alike, and how much of each of their roles was cut."""

    stack: str
    first: int
    last: int
    roles: Mapping[str, Matched]

    def to_dict(self) -> dict[str, Any]:
        """The row as ``--json`` prints it: the shares are those of one layer."""
        roles = {name: vars(share) for name, share in self.roles.items()}
        return {"stack": self.stack, "first": self.first, "last": self.last, "roles": roles}

    def __str__(self) -> str:
        span = str(self.first) if self.first == self.last else f"{{{self.first}..{self.last}}}"
        return f"{self.stack}.{span}: {_listed(self.roles)}"


@dataclass(frozen=True)
class Coverage:
    """Share of a model's sites that rules matched, by role, by kind and, of weights, by tower.

    A fused weight has the role of the whole and those of its parts: one that is cut as a whole is
    cut in every part, and is cut as a whole if every part is. ``uncovered`` are the parameters that
    are no weight or bias of a site, so that rules reach them as bare parameters alone, each with
    the operators that read it.
    """

    roles: Mapping[str, Matched]
    kinds: Mapping[str, Matched]
    uncovered: Mapping[str, tuple[str, ...]]
    layers: tuple[CoveredLayers, ...] = ()
    towers: Mapping[str, Matched] = field(default_factory=dict)

    @staticmethod
    def of(sites: Iterable[Placed], cut: Iterable[Placed]) -> Coverage:
        """The coverage of a model's ``sites`` by those that were ``cut``."""
        matched = {_key(site) for site in cut}
        known = list(sites)
        parts: dict[Any, list[Placed]] = {}
        for site in known:
            if site.site.whole is not None:
                parts.setdefault((site.block, id(site.site.whole)), []).append(site)
        roles: dict[str, list[bool]] = {}
        kinds: dict[str, list[bool]] = {}
        layers: dict[tuple[str, int], dict[str, list[bool]]] = {}
        towers: dict[str, list[bool]] = {}
        for site in known:
            mine = [_key(part) in matched for part in parts.get(_key(site), ())]
            within = site.site.whole is not None and (site.block, id(site.site.whole)) in matched
            is_cut = _key(site) in matched or within or (bool(mine) and all(mine))
            if site.role is not None and site.kind != "parameter":
                roles.setdefault(site.role, []).append(is_cut)
                if site.layer is not None:
                    layer = layers.setdefault((_stack(site), site.layer), {})
                    layer.setdefault(site.role, []).append(is_cut)
            if site.site.whole is None:
                kinds.setdefault(site.kind, []).append(is_cut or any(mine))
                if site.kind in WEIGHTS and "tower" in site.facts:
                    towers.setdefault(site.facts["tower"], []).append(is_cut or any(mine))
        by_layer = {place: _matched(found) for place, found in layers.items()}
        return Coverage(
            _matched(roles),
            _matched(kinds),
            _uncovered(known),
            _alike(by_layer),
            _matched(towers),
        )

    def to_dict(self) -> dict[str, Any]:
        """The shares as ``--json`` prints them, under the report's keys."""
        return {
            "coverage": {name: vars(share) for name, share in self.roles.items()},
            "kinds": {name: vars(share) for name, share in self.kinds.items()},
            "uncovered": list(self.uncovered),
            "layers": [row.to_dict() for row in self.layers],
            "towers": {name: vars(share) for name, share in self.towers.items()},
        }

    def lines(self) -> list[str]:
        """The shares as a report prints them: of weights, by kind and by role."""
        found = {kind: self.kinds[kind] for kind in WEIGHTS if kind in self.kinds}
        lines = [f"coverage: {_listed(found)}"]
        if len(self.towers) > 1:
            lines.append(f"  by tower: {_listed(self.towers)}")
        if self.roles:
            lines.append(f"  by role: {_listed(self.roles)}")
            lines += [f"    {row}" for row in self.layers]
        if self.uncovered:
            alike = {_NUMBER.sub("*", name): by for name, by in self.uncovered.items()}
            texts = [f"{name} (read by {', '.join(by)})" for name, by in alike.items()]
            more = f" and {len(alike) - SHOWN} more" if len(alike) > SHOWN else ""
            shown = ", ".join(texts[:SHOWN])
            count = len(self.uncovered)
            noun = "parameter" if count == 1 else "parameters"
            lines.append(f"  {count} {noun} of no site with a weight: {shown}{more}")
        return lines


def _key(site: Placed) -> tuple[str, int]:
    return site.block, id(site.site)


def _stack(site: Placed) -> str:
    """The list of layers that a site lies in: the path before the number of its layer."""
    names = site.module.split(".")
    return ".".join(names[: names.index(str(site.layer))])


def _alike(layers: Mapping[tuple[str, int], Mapping[str, Matched]]) -> tuple[CoveredLayers, ...]:
    """Rows of layers, those next to each other that are covered alike in one."""
    rows: list[CoveredLayers] = []
    for (stack, layer), roles in sorted(layers.items(), key=lambda item: item[0]):
        last = rows[-1] if rows else None
        if last is not None and (last.stack, last.last + 1, last.roles) == (stack, layer, roles):
            rows[-1] = replace(last, last=layer)
        else:
            rows.append(CoveredLayers(stack, layer, layer, roles))
    return tuple(rows)


def _matched(found: Mapping[str, Sequence[bool]]) -> dict[str, Matched]:
    return {name: Matched(sum(cut), len(cut)) for name, cut in found.items()}


def _uncovered(sites: Iterable[Placed]) -> dict[str, tuple[str, ...]]:
    others = (s for s in sites if s.kind == "parameter" and s.facts["of"] == "other")
    return {str(site.parameter): site.facts["read_by"] for site in others}


def _listed(counts: Mapping[str, Matched]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
