"""Names of tensors in AdapterHub's files: `<module>.<what>.<adapter>.<which>`.

A rule file lists for each parameter what follows the module, with a * for the adapter's name:
`loras.*.lora_A`. What begins with a / is the same for all sites, from the base model on. Several
parameters under one name are one tensor: the parts of a fused weight one below the other, in their
order in the weight, and the prefixes of all layers side by side,

    K of (length, kv_heads, head_dim), V, the next K, ...    as (length, 2 layers, ...), flattened
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from peftsurgery.capture.names import join
from peftsurgery.errors import SurgeryError
from peftsurgery.formats.adapterhub.library import named
from peftsurgery.formats.adapterhub.sites import HubSites
from peftsurgery.language import shape_of
from peftsurgery.surgery.plan.cut import Cut


@dataclass
class JoinedTensor:
    """One tensor of a file: the parameters that it holds, in order, and their shapes."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def beside(self) -> bool:
        """Whether the parameters lie side by side: those of three dims and more, of tokens."""
        return len(next(iter(self.shapes.values()))) > 2

    def split(self, key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parameters in a tensor. PSG507 if it has another shape."""
        first = next(iter(self.shapes.values()))
        rows = [shape[0] for shape in self.shapes.values()]
        count = len(self.shapes) * math.prod(first)
        wanted = (count,) if self.beside else (sum(rows), *first[1:])
        if tuple(tensor.shape) != wanted:
            raise SurgeryError(
                "PSG507",
                f"'{key}' has shape {list(tensor.shape)}, where {list(wanted)} is needed",
                "it was made for another base, or the config says otherwise",
            )
        if self.beside:
            parts = tensor.view(first[0], len(rows), *first[1:]).unbind(1)
        else:
            parts = tensor.split(rows)
        return dict(zip(self.shapes, parts, strict=True))

    def join(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The tensor that holds the parameters."""
        own = [values[name].detach().cpu() for name in self.shapes]
        return torch.stack(own, 1).flatten() if self.beside else torch.cat(own)


def joined_tensors(cuts: Iterable[Cut], sites: HubSites, name: str) -> dict[str, JoinedTensor]:
    """The tensors that an adapter of this name is, by their names without the base model's."""
    found: dict[str, JoinedTensor] = {}
    for cut in sorted(cuts, key=lambda cut: cut.site.slice.start if cut.site.slice else 0):
        holder = sites.plain(sites.holder(cut.placed))
        for param, suffix in named(cut.rule).items():
            pooled = suffix.startswith("/")
            key = join("" if pooled else holder, suffix.lstrip("/").replace("*", name))
            shape = tuple(shape_of(cut.rule.params[param], cut.rule, cut.numbers))
            found.setdefault(key, JoinedTensor()).shapes[cut.parameters[param]] = shape
    return found
