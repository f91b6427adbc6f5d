"""Rewriting of a model's captures: a plan for each capture, programs for each mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peftsurgery.capture import Capture
from peftsurgery.capture.copying import SharedByCopies
from peftsurgery.surgery.fourbit.pack import PackedWeight
from peftsurgery.surgery.model.changed_inputs import ChangedInputs
from peftsurgery.surgery.plan.cut import Cut
from peftsurgery.surgery.plan.fusion import taking_part
from peftsurgery.surgery.plan.mode import Mode
from peftsurgery.surgery.plan.plan import Plan, make_plan
from peftsurgery.surgery.plan.same_places import check_reached
from peftsurgery.surgery.rewrite.capture import Rewrites
from peftsurgery.surgery.rewrite.inputs import new_shapes


@dataclass(frozen=True, eq=False)
class Rewriting(SharedByCopies):
    """The operations of a plan, repeated in every further capture.

    ``first`` is the plan of the capture that the model was operated on in, ``inputs`` what its
    operations change of the inputs. What is ``exact`` is computed as the rules' text says.
    """

    first: Plan
    inputs: ChangedInputs
    exact: bool = False
    _plans: dict[int, tuple[Capture, Plan]] = field(default_factory=dict)
    _rewrites: Rewrites = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rewrites", Rewrites(self.exact))

    def plan_of(self, capture: Capture) -> Plan:
        """Plan of a capture, made once: cuts of all operations, active or not."""
        known = self._plans.get(id(capture))
        if known is None:
            known = self._plans[id(capture)] = capture, make_plan(self.first.operations, capture)
        return known[1]

    def cuts_in(self, capture: Capture, mode: Mode) -> list[Cut]:
        """The cuts that are made in a capture in a mode."""
        if mode.merged:
            return []
        cuts = taking_part(self.plan_of(capture).cuts, mode)
        return [cut for cut in cuts if self.inputs.has_cut(capture, cut)]

    def new_shapes(self, mode: Mode, capture: Capture) -> dict[str, tuple[Any, ...]]:
        """Shapes of a capture's inputs after rewriting, by argument name."""
        return new_shapes(self.cuts_in(capture, mode))

    def rewritten(
        self,
        capture: Capture,
        mode: Mode,
        stored: Mapping[str, PackedWeight],
        moved: Mapping[str, str],
    ) -> Capture:
        """Rewrite a capture by the cuts that take part in a mode.

        ``stored`` are the weights that the model keeps packed, ``moved`` the names that parameters
        have instead of their own. PSG307 if the capture has sites the first one had not, PSG318 if
        it has lost some.
        """

        def is_made(cut: Cut) -> bool:
            return mode.takes_part(cut) and self.inputs.has_cut(capture, cut)

        check_reached(self.first, self.plan_of(capture), is_made)
        cuts = self.cuts_in(capture, mode)
        order = mode.names if mode.by_row else None
        ready = self._rewrites.capture(capture, cuts, order, stored, moved)
        return self.inputs.conditioned(capture, ready, cuts)
