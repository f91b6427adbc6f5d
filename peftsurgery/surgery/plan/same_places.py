"""That the rules cut in a further capture where they cut in the first.

Rules are applied once, to one capture, and done again to each that other inputs make. Where the two
differ, the difference is either in the inputs (a decoder that is not run, a head that is not asked
for) or in what the graphs were seen to mean, and then what was trained would be left out without a
word. They are told apart by what is still there: a weight that is read, attention or a residual
addition in the same module, in a way that the rule did not leave alone before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from peftsurgery.anatomy import Placed
from peftsurgery.capture.names import join
from peftsurgery.errors import SurgeryError
from peftsurgery.surgery.plan.cut import Cut
from peftsurgery.surgery.plan.plan import Plan

Target = tuple[str, str]
"""A weight, or a kind of site in a module: what is cut there, and where."""
Manner = tuple[Any, ...]
"""A kind of site, the part of a fused weight, and the facts that tell such sites apart."""


def check_reached(first: Plan, now: Plan, is_made: Callable[[Cut], bool]) -> None:
    """Refuse a capture that reaches more than the first (PSG307), or loses a cut (PSG318).

    ``is_made`` says of a cut whether it takes part in the call: what rests may be lost.
    """
    new = [n for cut in now.cuts for n in cut.parameters.values() if n not in first.added]
    if new:
        raise SurgeryError(
            "PSG307",
            f"these inputs reach {len(new)} places that the rules were not applied to, "
            f"'{new[0]}' first",
            "capture the model with these inputs before applying the rules",
        )
    lost = [cut for cut in lost_cuts(first, now) if is_made(cut)]
    if lost:
        raise SurgeryError(
            "PSG318",
            f"with these inputs the model uses {len(lost)} places that the rules were applied to "
            f"in another way, '{_path(lost[0])}' first, and they would do nothing there",
            "capture the model with these inputs before applying the rules, or choose the sites by "
            "path instead of role",
        )


def lost_cuts(first: Plan, now: Plan) -> list[Cut]:
    """The cuts that are not made again in a capture that reaches their targets.

    A rule that rewrites nothing needs no cut: what it trains or stores is read by its name.
    """
    again = {_identity(cut) for cut in now.cuts}
    gone = [cut for cut in first.cuts if cut.rule.rewrite and _identity(cut) not in again]
    if not gone:
        return []
    before, after = _manners(first), _manners(now)
    read = {name for kind, name in after if kind in ("weight", "parameter")}
    lost = []
    for cut in gone:
        if cut.placed.kind == "pattern":
            is_lost = bool(cut.weights) and read.issuperset(cut.weights.values())
        else:
            target = _target(cut.placed)
            left_alone = _uncut(before, first.cuts, cut, target)
            left_alone -= _wholes(before[target])
            is_lost = not _uncut(after, now.cuts, cut, target) <= left_alone
        if is_lost:
            lost.append(cut)
    return lost


def _manners(plan: Plan) -> dict[Target, set[Manner]]:
    """How each target is used: as what kinds of site, and which parts of a fused weight."""
    sites = [site for each in plan.selections for site in each.sites]
    found: dict[Target, set[Manner]] = {}
    for site in sites:
        found.setdefault(_target(site), set()).add(_manner(site))
    for site in sites:  # a weight that no site is about is read all the same
        if site.kind == "parameter":
            found.setdefault(("weight", str(site.parameter)), {_manner(site)})
    return found


def _uncut(
    manners: dict[Target, set[Manner]], cuts: Iterable[Cut], lost: Cut, target: Target
) -> set[Manner]:
    """How a target is used besides where the rule of a cut cuts there."""
    same = (cut for cut in cuts if cut.operation is lost.operation and cut.rule is lost.rule)
    mine = {_manner(cut.placed) for cut in same if _target(cut.placed) == target}
    return manners.get(target, set()) - mine


def _wholes(manners: Iterable[Manner]) -> set[Manner]:
    """Uses as a whole of fused weights whose parts are sites of their own."""
    parts = [manner for manner in manners if manner[1] is not None]
    return {(kind, None, *rest) for kind, _, *rest in parts}


def _target(site: Placed) -> Target:
    """Key of a site across captures: its weight, or kind and module where it has none."""
    if site.parameter is None:
        return site.kind, site.module
    return "parameter" if site.kind == "parameter" else "weight", site.parameter


def _manner(site: Placed) -> Manner:
    facts = [site.facts.get(name) for name in ("after", "kind", "causal")]
    return (site.kind, site.site.label, *facts)


def _path(cut: Cut) -> str:
    return join(cut.placed.block, cut.holder)


def _identity(cut: Cut) -> tuple[Any, ...]:
    return cut.operation, id(cut.rule), _path(cut), cut.site.parameter
