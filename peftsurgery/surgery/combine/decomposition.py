"""Changes of a weight, merged and taken apart again into two parameters of a rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftsurgery.checkpoint.tensor_merge import Merge
from peftsurgery.language.parameter_axes import axes_of
from peftsurgery.language.readings import fold, shapes_of
from peftsurgery.language.rule_algebra import near
from peftsurgery.surgery.combine.merge_tensors import merge_tensors
from peftsurgery.surgery.combine.strategies import (
    Form,
    Share,
    Structure,
    one_size,
    untrue,
    with_size,
)
from peftsurgery.surgery.plan.cut import Cut, Operation
from peftsurgery.surgery.rewrite.environment import TensorDomain, environment
from peftsurgery.surgery.rewrite.layout import wide

# Singular values that are smaller, as shares of the largest, are rounding, and need no rank.
PRECISION = 1e-6
# A share of a change that the rounding of its parameters loses.
ROUNDING = 1e-5


class Factored(Form):
    """Changes of the weight, merged and taken apart into two parameters.

    They have the rank that the merged change needs, unless another one is given: what that loses,
    and what ``clamp`` does, is told by :meth:`lost`.
    """

    def __init__(self, merge: Merge, rank: int | None, clamp: float | None) -> None:
        super().__init__()
        self.merge, self.rank, self.clamp = merge, rank, clamp
        self.halves: dict[int, tuple[Tensor, Tensor]] = {}  # by the identity of a site's shares
        self.norms: list[tuple[float, float]] = []

    def settings(self, operation: Operation, sites: Sequence[Sequence[Share]]) -> dict[str, Any]:
        """The size is the given rank, or the largest that a site needs."""
        size = one_size(operation, sites)
        for shares in sites:
            self.halves[id(shares)] = self.taken_apart(shares[0].cut, shares)
        needed = max(V.shape[0] for _, V in self.halves.values())
        return with_size(operation, size, self.rank or max(needed, 1))

    def taken_apart(self, cut: Cut, shares: Sequence[Share]) -> tuple[Tensor, Tensor]:
        """Best rank-r factors (truncated SVD) of the merged change."""
        structure = self.structure(cut, shares)
        left, _, _ = _factors_of_weight(structure)
        parts = [_turned(cut, _weight_change(share)) for share in shares]
        # as the weight is stored, so that what is drawn at random is drawn in that order
        total = _turned(cut, merge_tensors(self.merge, parts, [share.weight for share in shares]))
        shapes = shapes_of(cut.rule, cut.numbers)
        one = axes_of(cut.rule, left, structure.sized)[0]
        rows = math.prod(shapes[left]) // shapes[left][one]
        matrix = total.reshape(rows, -1)
        U, S, V = torch.linalg.svd(matrix.double(), full_matrices=False)
        needed = int((S[0] * PRECISION < S).sum())
        rank = needed if self.rank is None else min(self.rank, needed)
        U, V = (U[:, :rank] * S[:rank]).to(total), V[:rank].to(total)
        if self.clamp is not None and rank:
            limit = torch.quantile(torch.cat([U.flatten(), V.flatten()]), self.clamp)
            U, V = U.clamp(-limit, limit), V.clamp(-limit, limit)
        self.norms.append((float((matrix - U @ V).norm()), float(matrix.norm())))
        return U, V

    def values(self, cut: Cut, shares: Sequence[Share]) -> dict[str, Tensor]:
        """Parameters whose change is nearest to the merged one, zero-padded above its rank."""
        structure = self.structure(cut, shares)
        left, right, scale = _factors_of_weight(structure)
        U, V = self.halves.pop(id(shares))
        shapes = shapes_of(cut.rule, cut.numbers)
        one, other = (axes_of(cut.rule, name, structure.sized)[0] for name in (left, right))
        missing = shapes[left][one] - V.shape[0]
        made = {name: V.new_zeros(shape) for name, shape in shapes.items()}
        for name, axis, half in ((left, one, U.T / scale), (right, other, V)):
            values = made[name].movedim(axis, 0)
            values.copy_(F.pad(half, (0, 0, 0, missing)).reshape(values.shape))
        return made

    def lost(self) -> float:
        """Relative Frobenius error of the combination's changes, from 0 to 1."""
        missing, whole = (math.hypot(*norms) for norms in zip(*self.norms, strict=True))
        share = missing / whole if whole else 0.0
        return share if share > ROUNDING else 0.0


def _weight_change(share: Share) -> Tensor:
    """What a share's fold adds to the weight, in fp32 or wider.

    In double precision until it is known, since it may be the small difference of large ones.
    """
    cut, device = share.cut, next(iter(share.params.values())).device
    known = {cut.parameters[name]: value.double() for name, value in share.params.items()}
    shape = cut.site.nodes["W"].meta["val"].shape
    nothing = torch.zeros(shape, dtype=torch.float64, device=device)
    names = environment(cut, TensorDomain(known.__getitem__, {"W": nothing}))
    change: Tensor = fold(cut.rule, names)["W"]
    return change.to(wide(next(iter(share.params.values()))).dtype)


def _turned(cut: Cut, weight: Tensor) -> Tensor:
    """Transpose a weight between the rules' (out, in) and its stored orientation."""
    return weight.transpose(-1, -2).contiguous() if "W" in cut.site.turned else weight


def _factors_of_weight(structure: Structure) -> tuple[str, str, float]:
    """Two parameters whose product is the change of the weight, and the scale. PSG316."""
    change, cut = structure.change, structure.cut
    if change is None or set(cut.rule.fold) != {"W"}:
        raise untrue(cut, "it does not fold into a weight alone")
    numbers, W = cut.numbers, change.specimen.bindings["W"]
    params = change.random(numbers)
    if not near(change.weight(numbers, params, W), change.weight(numbers, params, 2 * W)):
        raise untrue(cut, "what it adds to a weight depends on the weight")
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
    raise untrue(cut, "what it adds to a weight is no product of two of its parameters")
