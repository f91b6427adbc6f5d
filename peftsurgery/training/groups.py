"""Parameter groups for optimisers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from peftsurgery.arguments import checked
from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.language.parameter_axes import axes_of
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.plan.cut import Cut


@checked
def lora_plus(
    model: OperatedModel, lr: float, ratio: float = 16.0, faster: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Make optimiser groups in which some parameters learn ``ratio`` times as fast as others.

    LoRA+ (Hayou et al., 2024, arXiv:2402.12354, section 4): the factor of an update that leads
    from the ranks to the outputs (B, of shape (out, rank)) needs a larger rate than the other. With
    ``faster``, the parameters that rules call so are the fast ones instead. Everything else that is
    trained has the rate ``lr``:

        torch.optim.AdamW(lora_plus(o, lr=2e-4), weight_decay=0.01)

    Raises PSG324 if no rule has such a parameter.
    """
    by_name: dict[str, list[Cut]] = {}
    for cut in model.cuts:
        for name in cut.parameters:
            by_name.setdefault(name, []).append(cut)
    chosen = {name: by_name.get(name, []) for name in faster} or _to_outputs(by_name)
    for name, cuts in chosen.items():
        if not cuts:
            hint = did_you_mean(name, by_name) if by_name else "the rules add no parameters"
            raise SurgeryError("PSG324", f"no rule has a parameter '{name}'", hint)
    fast = {
        id(model.get_parameter(cut.parameters[name]))
        for name, cuts in chosen.items()
        for cut in cuts
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in fast], "lr": lr},
        {"params": [p for p in trained if id(p) in fast], "lr": lr * ratio},
    ]
    return [group for group in groups if group["params"]]


def _to_outputs(by_name: Mapping[str, Collection[Cut]]) -> dict[str, list[Cut]]:
    """The cuts whose parameters of a name have an axis of the outputs and one of the settings'."""
    found = {
        name: [
            cut
            for cut in cuts
            if axes_of(cut.rule, name, ["out"])
            and axes_of(cut.rule, name, cut.operation.own_settings)
        ]
        for name, cuts in by_name.items()
    }
    if not any(found.values()):
        message = "no rule has a parameter from its ranks to the outputs"
        raise SurgeryError("PSG324", message, "say which learn faster: faster=[...]")
    return {name: cuts for name, cuts in found.items() if cuts}
