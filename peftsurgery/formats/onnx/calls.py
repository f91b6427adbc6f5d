"""Calls of a model as its ONNX graph has them: tensors by name in, tensors by name out.

With a cache, what the model remembers is among them, under the names that runtimes for generation
look for: `past_key_values.0.key` goes in and `present.0.key` comes out, (batch, heads, tokens,
head_dim) both. A text begins with a past of no tokens, so one graph serves all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from peftsurgery.capture import GraphModel
from peftsurgery.capture.generating import check_generates
from peftsurgery.capture.withheld import refused
from peftsurgery.formats.onnx.translate import without_cache
from peftsurgery.formats.trial_inputs import (
    Inputs,
    free_axes,
    output_tensors,
    seen_inputs,
    unseen_inputs,
)

PAST, PRESENT = "past_key_values", "present"
IDS, MASK = "input_ids", "attention_mask"
TOKENS = 2
"""The axis of tokens in keys and values."""
SEEN, UNSEEN = (2, 4, 3), ((1, 0, 5), (3, 6, 1))
"""Sizes of a batch, its past and its new tokens, while a model with a cache is exported, and after;
torch takes 0 and 1 for fixed."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class NamedCalls:
    """Calls of one model; ``module`` is it, or has its forward."""

    model: GraphModel
    module: nn.Module
    cached: bool

    def outputs(self, given: Tensors, slots: Tensors | None = None) -> dict[str, Tensor]:
        """Outputs by name; ``slots`` stand for the module's parameters of these names."""
        inputs: dict[str, Any] = {n: v for n, v in given.items() if not n.startswith(PAST)}
        with torch.no_grad(), without_cache(self.model.source.module):
            if not self.cached:
                return output_tensors(self._call(inputs, slots))
            found = self._call({**inputs, PAST: _cache(given), "use_cache": True}, slots)
        rest = type(found)(**{name: value for name, value in found.items() if name != PAST})
        return {**output_tensors(rest), **_tensors(found[PAST], PRESENT)}

    def _call(self, inputs: dict[str, Any], slots: Tensors | None) -> Any:
        return torch.func.functional_call(self.module, {**(slots or {})}, (), inputs)

    def example(self) -> tuple[Inputs, dict[str, dict[int, Any]]]:
        """Inputs to export with, and the sizes of each that may vary."""
        if not self.cached:
            shapes = free_axes(self.model)
            return seen_inputs(self.model), {
                n: dict.fromkeys(a, Dim.AUTO) for n, a in shapes.items()
            }
        inputs = self._with_past(*SEEN)
        self.outputs(inputs)  # what serves such a call is captured now, and not within the export
        free = {n: (0, TOKENS) if n.startswith(PAST) else (0, 1) for n in inputs}
        return inputs, {n: dict.fromkeys(axes, Dim.AUTO) for n, axes in free.items()}

    def unseen(self) -> list[Inputs]:
        """Inputs at two other sizes."""
        if not self.cached:
            return unseen_inputs(self.model, unrolled=True)
        return [self._with_past(*sizes) for sizes in UNSEEN]

    def _with_past(self, batch: int, past: int, new: int) -> Inputs:
        """New tokens of a batch of texts after their past, which the model makes."""
        check_generates(self.model.source.module)
        known = seen_inputs(self.model)[IDS].flatten()
        wanted = torch.arange(batch * (past + new), device=known.device) % len(known)
        ids = known[wanted].view(batch, -1)
        mask = torch.ones_like(ids)
        mask[-1, 1] = 0  # not the first: it would see nothing, and what it gives would be anything
        start = max(past, 1)
        before = self.outputs({IDS: ids[:, :start], MASK: mask[:, :start]})
        kept = {n: v[:, :, :past] for n, v in before.items() if n.startswith(PRESENT)}
        remembered = {n.replace(PRESENT, PAST, 1): v for n, v in kept.items()}
        return {IDS: ids[:, past:], MASK: mask, **remembered}


def _cache(given: Tensors) -> DynamicCache:
    """What is given of a past as a cache; an empty one if nothing is."""
    cache = DynamicCache()
    count = sum(name.startswith(PAST) for name in given) // 2
    for layer in range(count):
        cache.update(given[f"{PAST}.{layer}.key"], given[f"{PAST}.{layer}.value"], layer)
    return cache


def _tensors(cache: Cache, word: str) -> dict[str, Tensor]:
    """The keys and values of a cache by name. PSG210 for one that keeps anything else."""
    found = dict[str, Tensor]()
    for number, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer:
            raise refused(f"a {type(layer).__name__} is no plain list of keys and values")
        found |= {
            f"{word}.{number}.{what}": tensor
            for what, tensor in (("key", layer.keys), ("value", layer.values))
            if tensor is not None
        }
    return found
