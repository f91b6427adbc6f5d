"""Parameter groups for optimisers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from peftsurgery.arguments import checked
from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.surgery.model.operated import OperatedModel


@checked
def lora_plus(
    model: OperatedModel, lr: float, ratio: float = 16.0, faster: Collection[str] = ("B",)
) -> list[dict[str, Any]]:
    """Make optimiser groups in which parameters called ``faster`` learn ``ratio`` times as fast.

    LoRA+ (Hayou et al., 2024, arXiv:2402.12354, section 4): B, which starts at zero, needs a
    larger rate than A. Everything else that is trained has the rate ``lr``:

        torch.optim.AdamW(lora_plus(o, lr=2e-4), weight_decay=0.01)

    Raises PSG324 if no rule has a parameter of such a name.
    """
    by_name: dict[str, set[str]] = {}
    for cut in model.cuts:
        for name, full in cut.parameters.items():
            by_name.setdefault(name, set()).add(full)
    for name in faster:
        if name not in by_name:
            hint = did_you_mean(name, by_name) if by_name else "the rules add no parameters"
            raise SurgeryError("PSG324", f"no rule has a parameter '{name}'", hint)
    fast = {id(model.get_parameter(full)) for name in faster for full in by_name[name]}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in fast], "lr": lr},
        {"params": [p for p in trained if id(p) in fast], "lr": lr * ratio},
    ]
    return [group for group in groups if group["params"]]
