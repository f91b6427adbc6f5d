"""Names of tensors in AdapterHub's files: `<module>.<what>.<adapter>.<which>`.

A rule file lists for each parameter what follows the module, with a * for the adapter's name:
`loras.*.lora_A`. Where the parts of a fused weight are adapted, the library stacks their tensors
along the first dim, in the order of the parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ..anatomy.site import join
from ..errors import SurgeryError
from ..language import Rule, shape_of
from ..surgery import Cut
from .adapterhub_library import FORMAT
from .adapterhub_places import Places


@dataclass
class Stack:
    """One tensor of a file: the parameters that it holds, one after another, and their shapes."""

    module: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def split(self, key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parameters in a tensor. PSG507 if it has another shape."""
        shapes = list(self.shapes.values())
        rows = [shape[0] if shape else 1 for shape in shapes]
        wanted = (sum(rows), *shapes[0][1:]) if shapes[0] else ()
        if tuple(tensor.shape) != wanted:
            raise SurgeryError(
                "PSG507",
                f"'{key}' has shape {list(tensor.shape)}, where {list(wanted)} is needed",
                "it was made for another base, or the config says otherwise",
            )
        if len(shapes) == 1:
            return dict.fromkeys(self.shapes, tensor)
        return dict(zip(self.shapes, tensor.split(rows), strict=True))

    def join(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The tensor that holds the parameters."""
        own = [values[name].detach().cpu() for name in self.shapes]
        return own[0] if len(own) == 1 else torch.cat(own)


def named(rule: Rule) -> dict[str, str]:
    """What a rule's parameters are called; nothing if the library has no such method."""
    table = rule.checkpoint.get(FORMAT, {})
    return {name: suffix for name, suffix in table.items() if name in rule.params}


def stacks(cuts: Iterable[Cut], places: Places, name: str) -> dict[str, Stack]:
    """The tensors that an adapter of this name is, by their names without the base model's."""
    found: dict[str, Stack] = {}
    for cut in sorted(cuts, key=lambda cut: cut.site.slice.start if cut.site.slice else 0):
        holder = places.plain(places.holder(cut.placed))
        for param, suffix in named(cut.rule).items():
            key = join(holder, suffix.replace("*", name))
            stack = found.setdefault(key, Stack(cut.placed.module))
            shape = tuple(shape_of(cut.rule.params[param], cut.rule, cut.numbers))
            stack.shapes[cut.parameters[param]] = shape
    return found
