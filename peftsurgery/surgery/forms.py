"""The forms that a combination of adapters can have: what each makes of the parameters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SurgeryError
from ..language import Rule, fold, resolve_settings, shape_of
from .change import Change, axes_of, changes, near, sizes_said
from .merging import Majority, Merge, is_number, merge_named
from .operation import Cut, Operation
from .rewriting import wide


@dataclass(frozen=True)
class Share:
    """What one adapter brings to a place: its weight, its cut there, and its parameters."""

    weight: float
    cut: Cut
    params: Mapping[str, Tensor]


class Form(ABC):
    """A form of combination."""

    def __init__(self) -> None:
        self._structures: dict[Any, Structure] = {}

    @abstractmethod
    def values(self, cut: Cut, shares: Sequence[Share]) -> dict[str, Tensor]:
        """The parameters of the combination at one place; ``cut`` is the combination's."""

    def settings(self, operation: Operation, places: Sequence[Sequence[Share]]) -> dict[str, Any]:
        """The settings of the combination, which does what ``operation`` does."""
        return dict(operation.settings)

    def trained(self, cut: Cut, changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """What parameters of the base that were trained are changed by."""
        raise _untrue(cut, "it trains parameters of the base, which have no rank")

    def structure(self, cut: Cut, shares: Sequence[Share]) -> Structure:
        """What is known of the rule under these settings, tried once."""
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
    def change(self) -> Change | None:
        """The rule on a specimen; None if there is none that it can be tried on."""
        return next(changes(self.rule, self.cut.numbers), None)

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
        """How many times the combination's change each adapter's is, for the same parameters.

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
    """Every parameter is merged with its namesakes."""

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
                raise SurgeryError(
                    "PSG315",
                    f"'{name}' at {cut.placed.module} has the shapes {shapes}",
                    "adapters of different rank are combined by 'cat' and 'svd'",
                )
            weights = [
                self.weight(structure, name, share.weight, ratio)
                for share, ratio in zip(shares, structure.ratios, strict=True)
            ]
            made[name] = self.merge(tensors, weights)
        return made

    def weight(self, structure: Structure, name: str, weight: float, ratio: float) -> float:
        """A parameter's weight: of k factors of a product each has the k-th root, one the sign."""
        factors = structure.factors
        mine = next((n for n, factor in enumerate(factors) if name in factor), None)
        if len(factors) > 1 and mine is not None:
            share = abs(weight * ratio) ** (1 / len(factors))
            return -share if weight * ratio < 0 and mine == 0 else share
        if ratio != 1 and not factors:
            raise _untrue(structure.cut, "its adapters have other settings, which are no factor")
        return weight if mine is None else weight * ratio

    def trained(self, cut: Cut, changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The changes merged."""
        return self.merge(changes, weights)


class Joined(Form):
    """Parameters are joined along the axes that one setting is the size of."""

    def settings(self, operation: Operation, places: Sequence[Sequence[Share]]) -> dict[str, Any]:
        """The size is the sum of the adapters', where there are most; elsewhere some is unused."""
        size = _one_size(operation, places)
        sums = [sum(share.cut.numbers[size] for share in shares) for shares in places]
        return _with_size(operation, size, max(sums))

    def values(self, cut: Cut, shares: Sequence[Share]) -> dict[str, Tensor]:
        """The joined parameters. PSG316 if their change is not the sum of the adapters'."""
        structure = self.structure(cut, shares)
        if structure.change is None or not structure.factors:
            raise _untrue(cut, "its change is not proportional to any of its parameters")
        pairs = zip(shares, structure.ratios, strict=True)
        weights = [share.weight * ratio for share, ratio in pairs]
        self.show(structure, structure.change, weights)
        shapes = {n: shape_of(p, cut.rule, cut.numbers) for n, p in cut.rule.params.items()}
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
                raise _untrue(structure.cut, f"'{name}' cannot be joined")
        return made

    def show(self, structure: Structure, change: Change, weights: Sequence[float]) -> None:
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
            raise _untrue(structure.cut, f"its change is no sum over its {structure.sized[0]}")
        structure.shown.add(tuple(weights))


class Factored(Form):
    """Changes of the weight, merged and taken apart into two parameters."""

    def __init__(self, merge: Merge, rank: int | None, clamp: float | None) -> None:
        super().__init__()
        self.merge, self.rank, self.clamp = merge, rank, clamp

    def settings(self, operation: Operation, places: Sequence[Sequence[Share]]) -> dict[str, Any]:
        """The size is the given rank, or the largest of the adapters'."""
        size = _one_size(operation, places)
        every = [share.cut.numbers[size] for shares in places for share in shares]
        return _with_size(operation, size, self.rank or max(every))

    def values(self, cut: Cut, shares: Sequence[Share]) -> dict[str, Tensor]:
        """The parameters whose change is nearest to the merged one."""
        structure = self.structure(cut, shares)
        left, right, scale = _factors_of_weight(structure)
        parts = [_turned(cut, _weight_change(share)) for share in shares]
        # as the weight is stored, so that what is drawn at random is drawn in that order
        total = _turned(cut, self.merge(parts, [share.weight for share in shares]))
        shapes = {n: shape_of(p, cut.rule, cut.numbers) for n, p in cut.rule.params.items()}
        one, other = (axes_of(cut.rule, name, structure.sized)[0] for name in (left, right))
        rank = shapes[left][one]
        U, V = self.halves(total.reshape(math.prod(shapes[left]) // rank, -1), rank)
        made = {name: total.new_zeros(shape) for name, shape in shapes.items()}
        made[left].movedim(one, -1).copy_((U / scale).view(made[left].movedim(one, -1).shape))
        made[right].movedim(other, 0).copy_(V.view(made[right].movedim(other, 0).shape))
        return made

    def halves(self, total: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Two matrices of this rank whose product is nearest to ``total``, of which one is scaled.

        A rank above the matrix's own leaves the rest at zero.
        """
        U, S, V = torch.linalg.svd(total, full_matrices=False)
        U, V = U[:, :rank] * S[:rank], V[:rank]
        if self.clamp is not None:
            limit = torch.quantile(torch.cat([U.flatten(), V.flatten()]), self.clamp)
            U, V = U.clamp(-limit, limit), V.clamp(-limit, limit)
        missing = rank - len(V)
        return F.pad(U, (0, missing)), F.pad(V, (0, 0, 0, missing))


def form_named(
    how: str, rank: int | None, density: float | None, majority: Majority, clamp: float | None
) -> Form:
    """The form of that name. PSG317 for settings that it has not."""
    if not isinstance(how, str):
        raise SurgeryError("PSG317", f"a combination is called by a text, not {how!r:.60}")
    factored = how == "svd" or how.endswith("_svd")
    if not factored and (rank is not None or clamp is not None):
        raise SurgeryError("PSG317", f"rank and clamp are for 'svd', not for '{how}'")
    if rank is not None and not (isinstance(rank, int) and is_number(rank) and rank >= 1):
        raise SurgeryError("PSG317", f"a rank is a whole number of at least 1, not {rank!r:.60}")
    if clamp is not None and not (is_number(clamp) and 0 <= clamp <= 1):
        raise SurgeryError("PSG317", f"a quantile is between 0 and 1, not {clamp!r:.60}")
    if how == "cat":
        if density is not None:
            raise SurgeryError("PSG317", "'cat' has no density")
        return Joined()
    inner = "linear" if how == "svd" else how.removesuffix("_svd")
    merge = merge_named(inner, density, majority)
    return Factored(merge, rank, clamp) if factored else Merged(merge)


def _one_size(operation: Operation, places: Sequence[Sequence[Share]]) -> str:
    """The one setting that is a size of an operation's parameters. PSG316 if it is not one."""
    shares = [share for each in places for share in each]
    sizes = {size for s in shares for size in sizes_said(s.cut.rule, operation.file.with_)}
    if len(sizes) != 1:
        named = f"{len(sizes)} settings are sizes" if sizes else "no setting is the size"
        raise _untrue(shares[0].cut, f"{named} of its parameters")
    return sizes.pop()


def _with_size(operation: Operation, size: str, value: int) -> dict[str, Any]:
    own = {name: operation.settings[name] for name in operation.file.with_}
    return resolve_settings(operation.file, {**own, size: value})


def _weight_change(share: Share) -> Tensor:
    """What a share's fold adds to the weight, in fp32 or wider."""
    params = {n: wide(v) for n, v in share.params.items()}
    change: Tensor = fold(share.cut.rule, {**share.cut.numbers, **params, "W": _nothing(share)})[
        "W"
    ]
    return change


def _turned(cut: Cut, weight: Tensor) -> Tensor:
    """From the weight that rules see to the one that is stored, and back."""
    return weight.transpose(-1, -2).contiguous() if "W" in cut.site.turned else weight


def _nothing(share: Share) -> Tensor:
    """A weight of zeros, as a rule sees it."""
    value = next(iter(share.params.values()))
    node = share.cut.site.nodes["W"]
    shape = list(node.meta["val"].shape)
    if "W" in share.cut.site.turned:
        shape = shape[::-1]
    if share.cut.site.slice is not None:
        shape[0] = share.cut.site.slice.rows
    return torch.zeros(shape, device=value.device)


def _factors_of_weight(structure: Structure) -> tuple[str, str, float]:
    """Two parameters whose product is the change of the weight, and the scale. PSG316."""
    change, cut = structure.change, structure.cut
    if change is None or set(cut.rule.fold) != {"W"}:
        raise _untrue(cut, "it does not fold into a weight alone")
    numbers, W = cut.numbers, change.bindings["W"]
    params = change.random(numbers)
    if not near(change.weight(numbers, params, W), change.weight(numbers, params, 2 * W)):
        raise _untrue(cut, "what it adds to a weight depends on the weight")
    axes = {name: axes_of(cut.rule, name, structure.sized) for name in params}
    ranked = [name for name in params if len(axes[name]) == 1]
    for left, right in permutations(ranked, 2):
        alone = {n: v if n in (left, right) else torch.zeros_like(v) for n, v in params.items()}
        added = change.weight(numbers, alone, W)
        one, other = (alone[n].movedim(axes[n][0], 0).flatten(1) for n in (left, right))
        if len(one) != len(other) or one.shape[1] * other.shape[1] != added.numel():
            continue
        product = (one.T @ other).view(added.shape)
        scale = float((added * product).sum() / (product * product).sum())
        if scale and near(added, scale * product):
            return left, right, scale
    raise _untrue(cut, "what it adds to a weight is no product of two of its parameters")


def _untrue(cut: Cut, why: str) -> SurgeryError:
    return SurgeryError(
        "PSG316",
        f"'{cut.operation.file.name}' cannot be combined in this way: {why}",
        "how='linear' merges parameters one by one; activate several to add their changes",
    )
