"""Penalties: what rules add to the loss for the parameters they made.

Each rule gives a number for a site. Over the sites of one operation's rule the numbers are summed
or averaged, as the rule says; over rules they are summed. A layer that is called twice counts once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..language import penalty
from .operation import Cut
from .rewriting import orient

if TYPE_CHECKING:
    from .operated import OperatedModel


def penalty_of(model: OperatedModel) -> torch.Tensor:
    """The sum of the active adapters' penalties: a tensor without dimensions, 0.0 if none."""
    groups: dict[Any, dict[Any, Cut]] = {}
    for cut in model.active_cuts:
        if cut.rule.penalty:
            names = (*cut.parameters.values(), *cut.weights.values(), cut.site.slice)
            groups.setdefault((cut.operation, id(cut.rule)), {})[names] = cut
    total = torch.zeros((), device=next((p.device for p in model.parameters()), None))
    for cuts in groups.values():
        sites = [penalty(cut.rule, _bindings(model, cut)) for cut in cuts.values()]
        for kind in sites[0]:
            values = [torch.as_tensor(site[kind]).to(total.device) for site in sites]
            summed = torch.stack(values).sum()
            total = total + (summed / len(values) if kind == "mean" else summed)
    return total


def _bindings(model: OperatedModel, cut: Cut) -> dict[str, Any]:
    """The names a penalty may read: in fp32 or wider, whatever the model is in."""
    bound: dict[str, Any] = {**dict.fromkeys(cut.rule.kind.weights, 0.0), **cut.numbers}
    for name, full in cut.weights.items():
        bound[name] = orient(_wide(model.get_parameter(full)), cut.site, name)
    for name, full in cut.parameters.items():
        bound[name] = _wide(model.get_parameter(full))
    return bound


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
