"""The forms that a combination of adapters can have: what each makes of the parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from peftsurgery.checkpoint.tensor_merge import Merge
from peftsurgery.errors import SurgeryError
from peftsurgery.language.parameter_axes import axes_of, sizes_said
from peftsurgery.language.readings import initial_values, shapes_of
from peftsurgery.language.rule_algebra import Effect, effects, near
from peftsurgery.language.schema import Rule
from peftsurgery.language.settings import resolve_settings
from peftsurgery.surgery.combine.merge_tensors import merge_tensors
from peftsurgery.surgery.plan.cut import Cut, Operation


@dataclass(frozen=True)
class Share:
    """One adapter's contribution at a site: weight, cut and parameter values."""

    weight: float
    cut: Cut
    params: Mapping[str, Tensor]


class Form(ABC):
    """Strategy of a combination: how parameters of several adapters become one's."""

    def __init__(self) -> None:
        self._structures: dict[Any, Structure] = {}

    @abstractmethod
    def values(self, cut: Cut, shares: Sequence[Share]) -> dict[str, Tensor]:
        """The parameters of the combination at one site; ``cut`` is the combination's."""

    def settings(self, operation: Operation, sites: Sequence[Sequence[Share]]) -> dict[str, Any]:
        """The settings of the combination, which does what ``operation`` does."""
        return dict(operation.settings)

    def trained(self, cut: Cut, changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Combined change of base parameters that the adapters trained."""
        raise untrue(cut, "it trains parameters of the base, which have no rank")

    def lost(self) -> float:
        """The share of the change that the combination does not have, from 0 to 1."""
        return 0.0

    def structure(self, cut: Cut, shares: Sequence[Share]) -> Structure:
        """Algebra of the rule under these settings, probed once and kept."""
        used = (cut.operation, *(share.cut.operation for share in shares))
        key = (id(cut.rule), used, cut.numbers.get("groups"))
        if key not in self._structures:
            self._structures[key] = Structure(cut, [share.cut for share in shares])
        return self._structures[key]


@dataclass
class Structure:
    """What a rule's change is made of, under the settings of a combination and its adapters."""

    cut: Cut
    cuts: Sequence[Cut]
    shown: set[Any] = field(default_factory=set)

    @property
    def rule(self) -> Rule:
        """The rule that all of them follow."""
        return self.cut.rule

    @cached_property
    def change(self) -> Effect | None:
        """The rule on a specimen; None if there is none that it can be tried on."""
        return next(effects(self.rule, self.cut.numbers), None)

    @cached_property
    def factors(self) -> list[frozenset[str]]:
        """The sets of parameters that the change is proportional to."""
        return [] if self.change is None else self.change.factors(self.cut.numbers)

    @cached_property
    def sized(self) -> list[str]:
        """The settings that are sizes of parameters."""
        return sizes_said(self.rule, self.cut.operation.file.with_)

    @cached_property
    def ratios(self) -> list[float]:
        """Ratio of each adapter's change to the combination's, for equal parameters.

        PSG315 if an adapter's settings differ in another way.
        """
        found = []
        for other in self.cuts:
            if self.change is None:
                ratio = 1.0 if other.operation.settings == self.cut.operation.settings else None
            else:
                ratio = self.change.ratio(other.numbers, self.cut.numbers, self.sized)
            if ratio is None:
                name = other.operation.name
                raise SurgeryError("PSG315", f"'{name}' has settings that differ in what they do")
            found.append(ratio)
        return found


class Merged(Form):
    """Merge each parameter with those of its name in the other adapters."""

    def __init__(self, merge: Merge) -> None:
        super().__init__()
        self.merge = merge

    def values(self, cut: Cut, shares: Sequence[Share]) -> dict[str, Tensor]:
        """The merged parameters."""
        structure, made = self.structure(cut, shares), {}
        for name in cut.rule.params:
            tensors = [share.params[name] for share in shares]
            shapes = [list(tensor.shape) for tensor in tensors]
            if any(shape != shapes[0] for shape in shapes):
                message = f"'{name}' at {cut.placed.module} has the shapes {shapes}"
                hint = "adapters of different rank are combined by 'cat' and 'svd'"
                raise SurgeryError("PSG315", message, hint)
            weights = [
                self.weight(structure, name, share.weight, ratio)
                for share, ratio in zip(shares, structure.ratios, strict=True)
            ]
            made[name] = merge_tensors(self.merge, tensors, weights)
        return made

    def weight(self, structure: Structure, name: str, weight: float, ratio: float) -> float:
        """Weight of one parameter: the k-th root for each of k factors, the sign on one of them."""
        factors = structure.factors
        mine = next((n for n, factor in enumerate(factors) if name in factor), None)
        if len(factors) > 1 and mine is not None:
            share = abs(weight * ratio) ** (1 / len(factors))
            return -share if weight * ratio < 0 and mine == 0 else share
        if ratio != 1 and not factors:
            raise untrue(structure.cut, "its adapters have other settings, which are no factor")
        return weight if mine is None else weight * ratio

    def trained(self, cut: Cut, changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The changes merged."""
        return merge_tensors(self.merge, changes, weights)


class Joined(Form):
    """Concatenate parameters along the axes whose size one setting gives."""

    def settings(self, operation: Operation, sites: Sequence[Sequence[Share]]) -> dict[str, Any]:
        """The size is the sum of the adapters', where there are most; elsewhere some is unused."""
        size = one_size(operation, sites)
        sums = [sum(share.cut.numbers[size] for share in shares) for shares in sites]
        return with_size(operation, size, max(sums))

    def values(self, cut: Cut, shares: Sequence[Share]) -> dict[str, Tensor]:
        """The joined parameters. PSG316 if their change is not the sum of the adapters'."""
        structure = self.structure(cut, shares)
        if structure.change is None or not structure.factors:
            raise untrue(cut, "its change is not proportional to any of its parameters")
        pairs = zip(shares, structure.ratios, strict=True)
        weights = [share.weight * ratio for share, ratio in pairs]
        self.show(structure, structure.change, weights)
        shapes = shapes_of(cut.rule, cut.numbers)
        return self.join(structure, shapes, [share.params for share in shares], weights)

    def join(
        self,
        structure: Structure,
        shapes: Mapping[str, tuple[int, ...]],
        params: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float],
    ) -> dict[str, Tensor]:
        """Parameters joined to these shapes, zero where nothing is; the first factor is weighted.

        PSG316 for a parameter that has no place to be joined at, and is not everybody's.
        """
        made = {}
        for name in structure.rule.params:
            axes = axes_of(structure.rule, name, structure.sized)
            weighted = name in structure.factors[0]
            scales = weights if weighted else [1.0] * len(weights)
            tensors = [p[name] * scale for p, scale in zip(params, scales, strict=True)]
            if len(axes) == 1:
                made[name] = tensors[0].new_zeros(shapes[name])
                joined = torch.cat(tensors, axes[0])
                made[name].narrow(axes[0], 0, joined.shape[axes[0]]).copy_(joined)
            elif not axes and weighted:
                made[name] = torch.stack(tensors).sum(0)
            elif not axes and all(torch.equal(tensor, tensors[0]) for tensor in tensors):
                made[name] = tensors[0]
            else:
                raise untrue(structure.cut, f"'{name}' cannot be joined")
        return made

    def show(self, structure: Structure, change: Effect, weights: Sequence[float]) -> None:
        """Refuse a rule whose joined change is not the sum, tried on a specimen."""
        if tuple(weights) in structure.shown:
            return
        numbers = [cut.numbers for cut in structure.cuts]
        params = [change.random(each, seed) for seed, each in enumerate(numbers)]
        shapes = change.shapes(structure.cut.numbers)
        joined = self.join(structure, shapes, params, weights)
        parts = [change.of(each, one) for each, one in zip(numbers, params, strict=True)]
        wanted = [w / r for w, r in zip(weights, structure.ratios, strict=True)]
        total = torch.stack([w * part for w, part in zip(wanted, parts, strict=True)]).sum(0)
        if not near(change.of(structure.cut.numbers, joined), total):
            over = f"over its {structure.sized[0]}" if structure.sized else "over its parameters"
            raise untrue(structure.cut, f"its change is no sum {over}")
        structure.shown.add(tuple(weights))


class Summed(Joined):
    """The weighted sum of the changes, exactly, or a refusal.

    Changes that are proportional to parameters are joined; those that are affine in all of them,
    and nothing where the parameters start, have the start and the weighted sum of the distances
    from it; one adapter with weight 1 is copied.
    """

    def settings(self, operation: Operation, sites: Sequence[Sequence[Share]]) -> dict[str, Any]:
        """The joined size, for changes that are joined and have one."""
        if all(_is_copy(shares) for shares in sites) or not _sizes(operation, sites):
            return dict(operation.settings)
        return super().settings(operation, sites)

    def values(self, cut: Cut, shares: Sequence[Share]) -> dict[str, Tensor]:
        """The parameters whose change is the sum. PSG316 if there are none of this rule."""
        if _is_copy(shares):
            return dict(shares[0].params)
        structure = self.structure(cut, shares)
        change = structure.change
        if structure.factors or change is None or not change.is_affine(cut.numbers):
            return super().values(cut, shares)
        if any(ratio != 1 for ratio in structure.ratios):
            raise untrue(cut, "its adapters have other settings, which are no factor")
        start = initial_values(cut.rule, cut.numbers, {})
        return {
            name: value.to(shares[0].params[name])
            + sum(
                share.weight * (share.params[name] - value.to(share.params[name]))
                for share in shares
            )
            for name, value in start.items()
        }

    def trained(self, cut: Cut, changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The weighted sum of the changes."""
        pairs = zip(changes, weights, strict=True)
        return torch.stack([weight * change for change, weight in pairs]).sum(0)


def one_size(operation: Operation, sites: Sequence[Sequence[Share]]) -> str:
    """The one setting that is a size of an operation's parameters. PSG316 if it is not one."""
    sizes = _sizes(operation, sites)
    if len(sizes) != 1:
        named = f"{len(sizes)} settings are sizes" if sizes else "no setting is the size"
        raise untrue(sites[0][0].cut, f"{named} of its parameters")
    return sizes.pop()


def with_size(operation: Operation, size: str, value: int) -> dict[str, Any]:
    """An operation's settings with another size."""
    return resolve_settings(operation.file, {**operation.own_settings, size: value})


def _is_copy(shares: Sequence[Share]) -> bool:
    """Whether a combination is one adapter as it is."""
    return len(shares) == 1 and shares[0].weight == 1


def _sizes(operation: Operation, sites: Sequence[Sequence[Share]]) -> set[str]:
    """The settings that are sizes of an operation's parameters."""
    rules = (share.cut.rule for shares in sites for share in shares)
    return {size for rule in rules for size in sizes_said(rule, operation.file.with_)}


def untrue(cut: Cut, why: str) -> SurgeryError:
    """The refusal of a form that is not true of a rule. PSG316."""
    return SurgeryError(
        "PSG316",
        f"'{cut.operation.file.name}' cannot be combined in this way: {why}",
        "activate several to add their changes, or let how='peft_linear' average their parameters",
    )
