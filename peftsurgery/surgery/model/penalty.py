"""Penalties: what rules add to the loss for the parameters they made.

Each rule gives a number for a site. Over the sites of an adapter, numbers that are to be summed are
summed, and those to be averaged are averaged, whichever of its rules they come from. A layer that
is called twice counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from peftsurgery.language import penalty, weights_in
from peftsurgery.surgery.plan.cut import Cut
from peftsurgery.surgery.rewrite.layout import orient, wide


def penalty_of(cuts: Iterable[Cut], read: Callable[[str], Tensor]) -> Tensor | None:
    """Sum of the cuts' penalties, a scalar tensor; None if no rule has one.

    ``read`` gives what a call reads under the name of a parameter.
    """
    sites: dict[Any, Cut] = {}
    for cut in cuts:
        if cut.rule.penalty:
            weights = (*cut.weights.values(), cut.site.slice)
            sites[cut.operation, id(cut.rule), (*cut.parameters.values(), *weights)] = cut
    groups: dict[tuple[str, str], list[Tensor]] = {}
    for cut in sites.values():
        for kind, value in penalty(cut.rule, _bindings(cut, read)).items():
            groups.setdefault((cut.operation.name, kind), []).append(torch.as_tensor(value))
    total: Tensor | None = None
    for (_, kind), values in groups.items():
        together = torch.stack([value.to(values[0].device) for value in values])
        added = together.mean() if kind == "mean" else together.sum()
        total = added if total is None else total + added.to(total.device)
    return total


def _bindings(cut: Cut, read: Callable[[str], Tensor]) -> dict[str, Any]:
    """The names a penalty may read: in fp32 or wider, whatever the model is in."""
    bound: dict[str, Any] = {**dict.fromkeys(cut.rule.kind.weights, 0.0), **cut.numbers}
    needed = weights_in(cut.rule.penalty.values(), cut.rule, cut.numbers)
    for name, full in cut.weights.items():
        if name in needed:
            bound[name] = orient(wide(read(full)), cut.site, name)
    return bound | {name: wide(read(full)) for name, full in cut.parameters.items()}
