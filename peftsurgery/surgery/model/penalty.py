"""Penalties: what rules add to the loss for the parameters they made.

Each rule gives a number for a site. Over the sites of an adapter, numbers that are to be summed are
summed, and those to be averaged are averaged, whichever of its rules they come from. A layer that
is called twice counts once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import torch

from peftsurgery.language import penalty, weights_in
from peftsurgery.surgery.plan.cut import Cut
from peftsurgery.surgery.rewrite.layout import orient, wide

if TYPE_CHECKING:
    from peftsurgery.surgery.model.operated import OperatedModel


def penalty_of(model: OperatedModel, cuts: Iterable[Cut], active: Collection[str]) -> torch.Tensor:
    """The sum of the cuts' penalties: a tensor without dimensions, 0.0 if none.

    ``active`` are the adapters whose copies of the base's parameters are read in their place.
    """
    sites: dict[Any, Cut] = {}
    for cut in cuts:
        if cut.rule.penalty:
            weights = (*cut.weights.values(), cut.site.slice)
            sites[cut.operation, id(cut.rule), (*cut.parameters.values(), *weights)] = cut
    total = torch.zeros((), device=next((p.device for p in model.parameters()), None))
    groups: dict[tuple[str, str], list[torch.Tensor]] = {}
    for cut in sites.values():
        for kind, value in penalty(cut.rule, _bindings(model, cut, active)).items():
            number = torch.as_tensor(value).to(total.device)
            groups.setdefault((cut.operation.name, kind), []).append(number)
    for (_, kind), values in groups.items():
        together = torch.stack(values)
        total = total + (together.mean() if kind == "mean" else together.sum())
    return total


def _bindings(model: OperatedModel, cut: Cut, active: Collection[str]) -> dict[str, Any]:
    """The names a penalty may read: in fp32 or wider, whatever the model is in."""
    bound: dict[str, Any] = {**dict.fromkeys(cut.rule.kind.weights, 0.0), **cut.numbers}
    read = weights_in(cut.rule.penalty.values(), cut.rule, cut.numbers)
    for name, full in cut.weights.items():
        if name in read:
            packed = full in model.stored
            value = model.dense(full) if packed else model.read(full, active)
            bound[name] = orient(wide(value), cut.site, name)
    for name, full in cut.parameters.items():
        bound[name] = wide(model.get_parameter(full))
    return bound
