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

from peftsurgery.language.readings import penalty
from peftsurgery.surgery.plan.cut import Cut
from peftsurgery.surgery.rewrite.environment import TensorDomain, environment
from peftsurgery.surgery.rewrite.layout import wide


def penalty_of(cuts: Iterable[Cut], read: Callable[[str], Tensor]) -> Tensor | None:
    """Sum of the cuts' penalties, a scalar tensor; None if no rule has one.

    ``read`` gives what a call reads under the name of a parameter.
    """
    sites: dict[Any, Cut] = {}
    for cut in cuts:
        if cut.rule.penalty:
            weights = (*cut.weights.values(), cut.site.slice)
            sites[cut.operation, id(cut.rule), (*cut.parameters.values(), *weights)] = cut
    # in fp32 or wider, whatever the model is in
    widely = TensorDomain(lambda name: wide(read(name)))
    groups: dict[tuple[str, str], list[Tensor]] = {}
    for cut in sites.values():
        for kind, value in penalty(cut.rule, environment(cut, widely)).items():
            groups.setdefault((cut.operation.name, kind), []).append(torch.as_tensor(value))
    total: Tensor | None = None
    for (_, kind), values in groups.items():
        together = torch.stack([value.to(values[0].device) for value in values])
        added = together.mean() if kind == "mean" else together.sum()
        total = added if total is None else total + added.to(total.device)
    return total
