"""Ranks that a budget took away: peft leaves them out of its tensors, and lists what is left.

    rank_pattern: {"<module>.lora_E": [true, false, true, ...]}

Here a tensor keeps its shape, and the ranks that were taken away are zero, which computes the same.
Which tensors have ranks, and along which dimension, is in the rules' ``ranks:``. Between two
choices of an allocator, what it took away may have grown back: that is written, since it counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.formats.peft.config import AdapterConfig
from peftsurgery.formats.peft.library import FORMAT
from peftsurgery.formats.peft.tensor_keys import Names
from peftsurgery.language.evaluation import evaluate
from peftsurgery.language.schema import Rule
from peftsurgery.surgery.plan.cut import Cut

PATTERN = "rank_pattern"


def spread(
    config: AdapterConfig, names: Names, tensors: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """The tensors with the ranks that were taken away put back as zeros.

    PSG503 for a pattern that is no list of booleans, PSG507 if a tensor has another number of
    ranks, PSG508 for one that is about no tensor.
    """
    rules = [rule for file in config.files for rule in file.rules if rule.ranks is not None]
    pattern = config.pattern(PATTERN)
    if not rules or not pattern:
        return tensors
    whole = dict(tensors)
    axes = _axes(rules)
    zeroed = {rule.suffixes(FORMAT)[rule.ranks.zero] for rule in rules if rule.ranks is not None}
    known = {f"{m}.{s}": m for m, keys in names.added.items() for s in zeroed if s in keys}
    for key, kept in pattern.items():
        if key not in known:
            hint = did_you_mean(key, known) if known else None
            raise SurgeryError("PSG508", f"{PATTERN} names '{key}', and there is no tensor", hint)
        if not isinstance(kept, list) or not all(isinstance(item, bool) for item in kept):
            raise SurgeryError("PSG503", f"the adapter's {PATTERN}['{key}'] is no list of booleans")
        for suffix, full in names.added[known[key]].items():
            if suffix in axes:
                whole[full] = _widened(full, tensors[full], torch.tensor(kept), axes[suffix])
    return whole


def _widened(key: str, value: Tensor, kept: Tensor, axis: int) -> Tensor:
    """A tensor of the ranks that were kept, with zeros for the others."""
    count = int(kept.sum())
    if value.dim() <= axis or value.shape[axis] not in (count, len(kept)):
        message = f"'{key}' has shape {list(value.shape)}, and {PATTERN} keeps {count} ranks"
        raise SurgeryError("PSG507", message)
    if value.shape[axis] == len(kept):
        return value
    shape = [len(kept) if dim == axis else size for dim, size in enumerate(value.shape)]
    return value.new_zeros(shape).index_copy(axis, kept.nonzero().flatten(), value)


def gather(
    modules: Iterable[tuple[str, Rule, Mapping[str, Tensor]]],
) -> tuple[dict[str, list[bool]], dict[str, dict[str, Tensor]]]:
    """What peft lists as kept, and each module's tensors by suffix without the ranks that are not.

    Where no rank counts for anything, or every one does, none was taken away yet.
    """
    every = [(module, rule, dict(tensors)) for module, rule, tensors in modules]
    kept = {
        module: _counting(rule, tensors)
        for module, rule, tensors in every
        if rule.ranks is not None
    }
    values = {module: tensors for module, _, tensors in every}
    if not any(k.any() for k in kept.values()) or all(k.all() for k in kept.values()):
        return {}, values
    pattern: dict[str, list[bool]] = {}
    for module, rule, tensors in every:
        if rule.ranks is not None:
            pattern[f"{module}.{rule.suffixes(FORMAT)[rule.ranks.zero]}"] = kept[module].tolist()
            positions = kept[module].nonzero().flatten()
            for suffix, axis in _axes([rule]).items():
                values[module][suffix] = tensors[suffix].detach().index_select(axis, positions)
    return pattern, values


def check_total(cut: Cut) -> None:
    """Peft loads no such adapter without the number of steps of its training. PSG510."""
    ranks = cut.rule.ranks
    if ranks is not None and not evaluate(ranks.total, cut.operation.settings):
        hint = f"apply the rules with {ranks.total}=..., or save the surgery itself with save()"
        message = f"'{cut.operation.name}' does not say how many steps its training has"
        raise SurgeryError("PSG510", f"{message}, and peft needs to know", hint)


def _counting(rule: Rule, tensors: Mapping[str, Any]) -> Tensor:
    """Which ranks of a module's tensors are not zero."""
    assert rule.ranks is not None
    value = tensors[rule.suffixes(FORMAT)[rule.ranks.zero]].detach().cpu()
    axis = rule.ranks.axes[rule.ranks.zero]
    return value.movedim(axis, 0).flatten(1).any(1)


def _axes(rules: Iterable[Rule]) -> dict[str, int]:
    """The dimension that counts the ranks, by the suffix of the tensor."""
    found = {}
    for rule in rules:
        for name, axis in (rule.ranks.axes if rule.ranks is not None else {}).items():
            if name in rule.suffixes(FORMAT):
                found[rule.suffixes(FORMAT)[name]] = axis
    return found
