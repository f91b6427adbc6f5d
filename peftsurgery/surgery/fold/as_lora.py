"""as_lora: whatever the active adapters change of the weights, as one adapter of low rank.

Serving stacks take plain LoRA and nothing else. The change of each weight, computed exactly as a
fold does, is taken apart by singular value decomposition into the parameters of the shipped rule
for a weight of its kind; at the rank that it needs, or at a smaller one whose error is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftsurgery.anatomy import Placed, survey
from peftsurgery.anatomy.made_weights import made_of
from peftsurgery.arguments import checked
from peftsurgery.capture.sharded import check_whole
from peftsurgery.checkpoint.low_rank import (
    Approximation,
    Factors,
    Wanted,
    checked_wish,
    factors_of,
    rows_in_blocks,
    share_lost,
)
from peftsurgery.errors import SurgeryError
from peftsurgery.language.loading import load_rules
from peftsurgery.language.schema import Expect
from peftsurgery.language.settings import resolve_settings
from peftsurgery.language.where import Where
from peftsurgery.surgery.applying import operate
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.model.shared import unoperated
from peftsurgery.surgery.plan.cut import Cut, Operation
from peftsurgery.surgery.rewrite.folded_weights import check_finite, exact_weights
from peftsurgery.surgery.rewrite.layout import orient


@dataclass(frozen=True)
class LoraForm:
    """How a change of one kind of weight is said: a shipped rule file, and its A and B.

    ``parameters`` makes them of the two factors of the weight, as a matrix of its first axis and
    all others, and of its shape.
    """

    rules: str
    parameters: Callable[[Tensor, Tensor, torch.Size], Mapping[str, Tensor]]


FORMS = {
    "linear": LoraForm("lora", lambda left, right, shape: {"A": right, "B": left}),
    "embedding": LoraForm("lora_embedding", lambda left, right, shape: {"A": left.T, "B": right.T}),
    "conv": LoraForm(
        "lora_conv",
        lambda left, right, shape: {
            "A": right.reshape(-1, *shape[1:]),
            "B": left[:, :, None, None],
        },
    ),
}


@checked
def as_lora(
    model: OperatedModel, rank: int | None = None, energy: float | None = None
) -> OperatedModel:
    """Make one LoRA adapter of what the active adapters change; returns a new model.

    ``rank`` is the largest that a weight gets, ``energy`` the share of each change's squared
    Frobenius norm that is kept; without either every weight has the rank that its change needs.
    Ranks may differ from weight to weight, and alpha is the rank, so the scale is 1. What is lost
    is a share of the change, ``report.lost``. Adapters that are not active are left out.

    Raises what :func:`fold` raises of rules that cannot be folded, PSG317 for a rank or an energy
    that is none, PSG415 if nothing is changed, PSG419 for a change that no LoRA can say: of a bias,
    a norm, experts, or a convolution that is grouped or not of two dimensions.
    """
    return lora_with_error(model, rank, energy)[0]


def lora_with_error(
    model: OperatedModel, rank: int | None = None, energy: float | None = None
) -> tuple[OperatedModel, dict[str, Approximation]]:
    """:func:`as_lora`, with the error of every weight by its name."""
    wanted = checked_wish(rank, energy)
    check_whole(model)
    model.bind()
    name = model.active[0] if len(model.active) == 1 else "as_lora"
    sites = _sites(model)
    found: list[tuple[Placed, Mapping[str, Tensor], int]] = []
    errors: dict[str, Approximation] = {}
    for weight, change in _changes(model):
        if not change.any():
            continue
        here = sites.get(weight, [])
        if not here:
            raise _unsaid(weight, "is no weight of a linear, an embedding or a convolution")
        for site in here:
            _check_form(site, weight)
            factors, parameters = _parameters(site, change, wanted)
            found.append((site, parameters, factors.rank))
            errors[weight] = factors.approximation
    if not found:
        message = "the active adapters change no weight, and neither would a LoRA"
        raise SurgeryError("PSG415", message, "they are untrained, or none is active")
    operations, known = _operations(found, name)
    lost = share_lost(errors.values())
    shares = {name: lost} if lost > LOSSLESS else {}
    return operate(unoperated(model), operations, known, lost=shares), errors


LOSSLESS = 1e-6  # a share of the change that the rounding of its parameters loses


def _changes(model: OperatedModel) -> Iterator[tuple[str, Tensor]]:
    """Each weight that the active adapters change, as stored, and the change in fp64.

    In fp64, since it is the small difference of large numbers. PSG403 if it is not finite.
    """
    for name, exact, _ in exact_weights(
        model.foldable({*model.trained, *model.stored}), lambda dtype: torch.float64
    ):
        if name in model.trained:
            with model.only():
                before = model.dense(name)
        else:
            before = model.dense(name)
        yield name, check_finite(name, exact.double() - before.double())


def _sites(model: OperatedModel) -> dict[str, list[Placed]]:
    """The places that can have a LoRA, by the weight that they read; one for each module."""
    found: dict[str, dict[str, Placed]] = {}
    for site in survey(model.base_capture):
        has_own = site.slice is None and not made_of(site.site)
        if site.kind in FORMS and has_own and site.parameter is not None:
            found.setdefault(site.parameter, {}).setdefault(site.module, site)
    return {name: list(placed.values()) for name, placed in found.items()}


def _check_form(site: Placed, weight: str) -> None:
    """Refuse a place whose shipped rule does not fit it. PSG419."""
    if site.kind == "conv":
        facts = site.facts
        if facts["rank"] != 2 or facts["groups"] != 1 or facts["transposed"]:
            raise _unsaid(weight, "is of a convolution that is grouped, or not of two dimensions")
    elif len(site.site.nodes["W"].meta["val"].shape) != 2:
        raise _unsaid(weight, "is no matrix")


def _unsaid(weight: str, why: str) -> SurgeryError:
    message = f"'{weight}' is changed, and {why}, so no LoRA can say it"
    return SurgeryError("PSG419", message, "fold, or leave that part of the adapter out")


def _parameters(
    site: Placed, change: Tensor, wanted: Wanted
) -> tuple[Factors, Mapping[str, Tensor]]:
    """The change of a weight in factors, and those as the parameters of its kind's rule."""
    seen = orient(change, site.site, "W")
    matrix = seen.flatten(1).contiguous().cpu().numpy()
    factors = factors_of(rows_in_blocks(matrix), matrix.shape[1], wanted)
    left, right = (torch.from_numpy(half.copy()) for half in (factors.left, factors.right))
    made = FORMS[site.kind].parameters(left, right, seen.shape)
    return factors, {name: value.contiguous() for name, value in made.items()}


def _operations(
    found: Iterable[tuple[Placed, Mapping[str, Tensor], int]], name: str
) -> tuple[list[Operation], dict[str, Tensor]]:
    """An operation for each kind of place and rank, and the values of all parameters."""
    groups: dict[tuple[str, int], list[tuple[Placed, Mapping[str, Tensor]]]] = {}
    for site, parameters, rank in found:
        groups.setdefault((site.kind, rank), []).append((site, parameters))
    operations, known = list[Operation](), dict[str, Tensor]()
    for (kind, rank), members in groups.items():
        operation = _operation(kind, rank, [site.module for site, _ in members], name)
        operations.append(operation)
        for site, parameters in members:
            full = Cut(operation, operation.file.rules[0], site).parameters
            known |= {full[short]: value for short, value in parameters.items()}
    return operations, known


def _operation(kind: str, rank: int, modules: Iterable[str], name: str) -> Operation:
    """The shipped rule for a kind of place, at these modules, with scale 1."""
    file = load_rules(FORMS[kind].rules)
    where: dict[str, Any] = {"paths": tuple(modules)}
    rule = file.rules[0].model_copy(
        update={
            "where": Where(**where, facts=file.rules[0].where.facts),
            "expect": Expect(at_least=len(where["paths"])),
        }
    )
    file = file.model_copy(update={"rules": (rule,)})
    return Operation(file, resolve_settings(file, {"rank": rank, "alpha": rank}), name)
