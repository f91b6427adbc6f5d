"""Sites that a rule chose, counted as the rule expects: in all, by block, by attention core."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from peftsurgery.anatomy import Placed
from peftsurgery.language.clauses import Clause, passes
from peftsurgery.language.schema import Expect


@dataclass(frozen=True, eq=False)
class Counted:
    """Chosen sites and what they are counted against.

    ``near`` are the sites of the rule's kind that pass all clauses but ``role``, ``cores`` the
    attention sites that do: cores count by themselves, so that one whose projections were not
    recognised is not passed over. ``asked`` are the clauses about roles, ``others`` sites of other
    kinds that pass all clauses: experts, or convolutions in groups.
    """

    kept: Sequence[Placed]
    near: Sequence[Placed]
    cores: Sequence[Placed]
    asked: Sequence[Clause]
    others: Sequence[Placed] = ()

    def complaint(self, expect: Expect) -> str | None:
        """What was expected and is not so, as an error says it after "expected"; None if all is."""
        count = len(self.kept)
        if expect.exactly is not None and count != expect.exactly:
            return f"{expect.exactly}"
        if expect.at_least is not None and count < expect.at_least:
            return f"at least {expect.at_least}"
        if expect.at_most is not None and count > expect.at_most:
            return f"at most {expect.at_most}"
        for wanted, uneven, group in (
            (expect.per_attention, self._uneven_cores, "attention"),
            (expect.per_block, self._uneven_blocks, "block"),
        ):
            found = None if wanted is None else uneven(wanted, not expect.complete)
            if found is not None:
                return f"{wanted} per {group}: {found}"
        return None

    def _uneven_blocks(self, wanted: int, _: bool) -> str | None:
        """Describe the blocks in reach with another number of sites; None if there are none.

        A weight that is used twice in one (for tokens, and for their distances) counts once.
        """
        kept = {(s.block, s.parameter or id(s), s.site.label) for s in self.kept}
        held = Counter(block for block, *_ in kept)
        blocks = list(dict.fromkeys(site.block for site in self.near))
        if not blocks:
            return "the model has no block" if wanted else None
        return _few(
            [f"{b or 'the model itself'} has {held[b]}" for b in blocks if held[b] != wanted]
        )

    def _uneven_cores(self, wanted: int, may_lack: bool) -> str | None:
        """Describe the attention cores in reach with another number of roles; None if none.

        Roles count, not sites: two projections to queries are one role.
        """
        if not self.roles:  # linear attention has no cores: what there is of it counts together
            held = {site.role for site in self.kept if site.facts.get("kind") == "linear"}
            return "the model has no attention" if len(held) != wanted else None
        wrong = {
            core: held
            for core, held in self.roles.items()
            if len(held) != wanted and not (may_lack and len(held | self._missing(core)) == wanted)
        }
        few = [f"{c} has {len(held)}{_named(held)}{self._others(c)}" for c, held in wrong.items()]
        return _few(few) or (None if self.kept or not wanted else "no core has any")

    def _missing(self, core: str) -> set[str]:
        """The roles asked for that a core may lack: those that it has no projection of its own for.

        And those of experts, which other rules are for. One convolution in groups is a projection
        like others, and missed.
        """
        others = self.elsewhere.get(core, {})
        of_experts = (role for role, kind in others.items() if kind == "experts")
        return {*self.unprojected.get(core, ()), *of_experts}

    def _others(self, core: str) -> str:
        """Which roles asked for are of sites of other kinds at a core, as an error says it."""
        found = (f"{role} is of {kind}" for role, kind in self.elsewhere.get(core, {}).items())
        return "".join(f"; {text}" for text in found)

    @cached_property
    def roles(self) -> dict[str, set[str]]:
        """The roles of the chosen sites at each attention core in reach."""
        found = {core: set[str]() for s in (*self.near, *self.cores) for core in s.attentions}
        for site in self.kept:
            for core in site.attentions:
                found.setdefault(core, set()).add(site.role or site.kind)
        return found

    @cached_property
    def elsewhere(self) -> dict[str, dict[str, str]]:
        """The roles asked for that sites of other kinds have at attention cores: core, role, kind.

        Those that no site of the rule's own kind has there.
        """
        found: dict[str, dict[str, str]] = {}
        for site in self.others if self.asked else ():
            for core in site.attentions:
                if site.role and site.role not in self.roles.get(core, ()):
                    found.setdefault(core, {})[site.role] = site.kind
        return found

    @cached_property
    def unprojected(self) -> dict[str, list[str]]:
        """The roles asked for that attention cores have no projection of their own for, by core."""
        found: dict[str, list[str]] = {}
        for site in self.cores:
            for role in site.facts.get("unprojected", ()) if self.asked else ():
                if passes(self.asked, replace(site, extra={**site.extra, "role": role})):
                    found.setdefault(site.attentions[0], []).append(role)
        return found


def _named(roles: set[str]) -> str:
    return f" ({', '.join(sorted(roles))})" if roles else ""


def _few(wrong: Sequence[str]) -> str | None:
    """The first of some faults and how many more there are; None if there are none."""
    more = f" and {len(wrong) - 3} more differ" if len(wrong) > 3 else ""
    return ", ".join(wrong[:3]) + more if wrong else None
