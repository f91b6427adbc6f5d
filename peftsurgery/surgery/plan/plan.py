"""Plans: the cuts of operations in one capture, checked before anything is changed.

The plan of the first capture says what a model gets: its parameters, what is trained and stored.
Every further capture (of other inputs, in train mode) has a plan of its own, made of the same
operations, and reaches the same parameters (:mod:`.same_places`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from peftsurgery.anatomy import Placed
from peftsurgery.capture import Capture
from peftsurgery.capture.copying import SharedByCopies
from peftsurgery.capture.threads import making
from peftsurgery.language.selection import Selection
from peftsurgery.surgery.plan.cut import Cut, Operation, check_lengthened, check_names_free
from peftsurgery.surgery.plan.fusion import check_fused, check_fusions
from peftsurgery.surgery.plan.select import select_cuts


@dataclass(frozen=True, eq=False)
class Plan(SharedByCopies):
    """Operations in order, their rules' selections among a capture's sites, and their cuts."""

    operations: tuple[Operation, ...]
    selections: tuple[Selection, ...]
    cuts: tuple[Cut, ...]

    @property
    def sites(self) -> Sequence[Placed]:
        """All sites of the capture; none without a rule."""
        return self.selections[0].sites if self.selections else ()

    @property
    def distinct_cuts(self) -> list[Cut]:
        """One cut for each site of a program, so that equal blocks are checked once."""
        return list({(c.operation, id(c.rule), c.site): c for c in self.cuts}.values())

    @cached_property
    def read(self) -> frozenset[str]:
        """The names of the parameters that the capture's programs read."""
        return frozenset(str(s.parameter) for s in self.sites if s.kind == "parameter")

    @cached_property
    def added(self) -> dict[str, str]:
        """The adapters by the absolute names of the parameters that their cuts add."""
        return {name: c.operation.name for c in self.cuts for name in c.parameters.values()}


def make_plan(operations: Iterable[Operation], capture: Capture) -> Plan:
    """Plan all operations, active or not, in a capture: their selections and cuts.

    Raises what selecting raises: PSG142, PSG145 and PSG303 for roles, rules and paths that are not
    there. What rules expect is for :func:`check_plan` to say.
    """
    with making():
        done = tuple(operations)
        cuts: list[Cut] = []
        selections: list[Selection] = []
        for operation in done:
            found, chosen = select_cuts(capture, operation, cuts)
            cuts += found
            selections += chosen
    return Plan(done, tuple(selections), tuple(cuts))


def check_plan(plan: Plan, taken: Iterable[str]) -> None:
    """Refuse a plan that is not what its rules expect, or that cannot be carried out.

    ``taken`` are the names of the parameters that the model has already. PSG301 and PSG302 for the
    number of sites, PSG340 and PSG341 for fusions, PSG304 for a name that is not free, PSG331 for
    positions of keys that are not there.
    """
    check_fusions(plan.operations)
    check_fused(plan.operations, plan.cuts)
    for selection in plan.selections:
        selection.check()
    check_names_free(plan.cuts, taken)
    check_lengthened(plan.cuts, plan.sites)
