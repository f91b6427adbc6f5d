"""combine: a new adapter that is a weighted combination of others.

Four forms, for any rule they are true of:

    linear   the change is the weighted sum of the adapters' changes, exactly: parameters are joined
             along the axes that one setting, the rank, is the size of, or summed
    cat      the same, and joined always
    svd      the changes of the weight are summed (or merged: ``ties_svd``) and taken apart into two
             parameters by singular value decomposition, of the rank that this needs or a given one
    merges   every parameter is merged with its namesakes, as peft does
             (:mod:`peftsurgery.checkpoint.tensor_merge`):
             where the change is a product of k of them, each gets the k-th root of its adapter's
             weight, so that LoRA's B A is weighted once and not twice; but factors of different
             adapters are multiplied too, so that this is no sum of changes, ``peft_linear`` neither

What a rule's change is a product of, and whether it is a sum over the rank, is tried on a specimen
(:mod:`peftsurgery.language.rule_algebra`). Where a form is not true of a rule, it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from peftsurgery.checkpoint.tensor_merge import MERGES, Majority, is_number, merge_named
from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.language.schema import Rule
from peftsurgery.surgery.applying import operate
from peftsurgery.surgery.combine.decomposition import Factored
from peftsurgery.surgery.combine.strategies import Form, Joined, Merged, Share, Summed
from peftsurgery.surgery.model.adapters import check_left_out, check_name
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.plan.cut import Cut, Operation, adapter_name, copy_name

SUMS: Mapping[str, type[Joined]] = {"linear": Summed, "cat": Joined}


def combine(
    model: OperatedModel,
    weights: Mapping[str, float],
    name: str,
    how: str = "linear",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority: Majority = "total",
    clamp: float | None = None,
) -> OperatedModel:
    """Combine adapters into a new one, a weighted sum or merge; returns a new model.

    ``how`` is linear: the weighted sum of what the adapters change, exactly. Or it is one of peft's
    ``add_weighted_adapter``: cat (linear, always by joined ranks), svd, magnitude_prune, ties,
    dare_linear, dare_ties, any of these four with ``_svd``, or peft_linear, which is peft's linear:
    it averages the factors one by one, and multiplies those of different adapters with each other.
    ``density`` is the share of entries that pruning keeps, ``majority`` how ties elects signs (by
    the total or by the number), ``rank`` what svd keeps (all that the change needs unless given),
    ``clamp`` the quantile that svd's factors are limited to. What svd loses by either is a share of
    the change, ``report.lost``. The combination is active instead of what it is made of. DARE
    draws from torch's random numbers.

    Raises PSG309 for a model without adapters, PSG310 for an unknown one, PSG304 if the name is
    taken, PSG315 for adapters that cannot be combined with each other, PSG316 for a method of which
    the form is not true, PSG317 for settings that make no sense.
    """
    form = form_named(how, rank, density, majority, clamp)
    weights = _checked(model, weights, name)
    rows = _rows(model, _counting(weights) if isinstance(form, Summed) else weights)
    operations: list[Operation] = []
    known: dict[str, Tensor] = {}
    for operation in dict.fromkeys(row.cut.operation for row in rows):
        mine = [row for row in rows if row.cut.operation is operation]
        settings = form.settings(operation, [row.shares for row in mine])
        made = replace(operation, settings=settings, name=name)
        operations.append(made)
        for row in mine:
            known |= _values(model, form, replace(row.cut, operation=made), row, known)
    with model.only(*(other for other in model.active if other not in weights)):
        lost = form.lost()
        return operate(model, operations, known, lost={name: lost} if lost else {})


def form_named(
    how: str, rank: int | None, density: float | None, majority: Majority, clamp: float | None
) -> Form:
    """Look up a strategy by name. Raises PSG317 for settings that it does not take."""
    if not isinstance(how, str):
        raise SurgeryError("PSG317", f"a combination is called by a text, not {how!r:.60}")
    factored = how == "svd" or how.endswith("_svd")
    if not factored and (rank is not None or clamp is not None):
        raise SurgeryError("PSG317", f"rank and clamp are for 'svd', not for '{how}'")
    if rank is not None and not (isinstance(rank, int) and is_number(rank) and rank >= 1):
        raise SurgeryError("PSG317", f"a rank is a whole number of at least 1, not {rank!r:.60}")
    if clamp is not None and not (is_number(clamp) and 0 <= clamp <= 1):
        raise SurgeryError("PSG317", f"a quantile is between 0 and 1, not {clamp!r:.60}")
    if how in SUMS:
        if density is not None:
            raise SurgeryError("PSG317", f"'{how}' has no density")
        return SUMS[how]()
    inner = "peft_linear" if how == "svd" else how.removesuffix("_svd")
    if inner not in MERGES:
        known = (*SUMS, "svd", *MERGES)
        raise SurgeryError("PSG317", f"no combination is called '{how}'", did_you_mean(how, known))
    merge = merge_named(inner, density, majority)
    return Factored(merge, rank, clamp) if factored else Merged(merge)


@dataclass(frozen=True)
class Row:
    """One site: the cut of the adapter that covers all sites, and every adapter's share."""

    cut: Cut
    shares: tuple[Share, ...]


def _checked(model: OperatedModel, weights: Mapping[str, float], name: str) -> dict[str, float]:
    """Validate the weights and the name of a combination; returns the weights."""
    if not isinstance(model, OperatedModel):
        message = f"adapters of an operated model are combined, not of a {type(model).__name__}"
        raise SurgeryError("PSG309", message, "apply rules to a captured model first")
    if not isinstance(weights, Mapping):
        hint = "name each adapter with its weight: {'a': 0.5, 'b': 0.5}"
        raise SurgeryError("PSG317", f"the weights are {weights!r:.60}, not numbers by name", hint)
    if not weights:
        raise SurgeryError("PSG317", "no adapters are named to be combined")
    for other, weight in weights.items():
        check_name(other, model.adapters)
        if not is_number(weight):
            message = f"the weight of '{other}' is {weight!r:.60}, not a finite number"
            raise SurgeryError("PSG317", message)
    if adapter_name(name) in model.adapters:
        raise SurgeryError("PSG304", f"the model has an adapter '{name}' already")
    return {other: float(weight) for other, weight in weights.items()}


def _counting(weights: Mapping[str, float]) -> Mapping[str, float]:
    """Weights without zeros, or all of them if every one is zero."""
    return {name: weight for name, weight in weights.items() if weight} or weights


def _rows(model: OperatedModel, weights: Mapping[str, float]) -> list[Row]:
    """Rows of the adapter that cuts at every site, in its order. Raises PSG315 if none does."""
    for other in weights:
        check_left_out(model.left_out, other, "PSG316")
    sites = {other: _sites(model, other) for other in weights}
    every = {key for cuts in sites.values() for key in cuts}
    widest = next((other for other, cuts in sites.items() if cuts.keys() == every), None)
    if widest is None:
        message = f"{_listed(weights)} change different places, and none of them all of the places"
        raise SurgeryError("PSG315", message, "combine adapters of which one covers the others")
    rows = []
    for key, cut in sites[widest].items():
        cuts = {other: found[key] for other, found in sites.items() if key in found}
        for other, found in cuts.items():
            if _method(found.rule) != _method(cut.rule):
                message = f"'{other}' and '{widest}' are different methods at {cut.placed.module}"
                raise SurgeryError("PSG315", message)
        shares = tuple(Share(weights[n], c, _params(model, c)) for n, c in cuts.items())
        rows.append(Row(cut, shares))
    return rows


def _sites(model: OperatedModel, adapter: str) -> dict[Any, Cut]:
    """An adapter's cuts by what they cut. PSG315 if it cuts something twice."""
    found: dict[Any, Cut] = {}
    for cut in model.cuts:
        if cut.operation.name != adapter:
            continue
        nodes = tuple(sorted((name, node.name) for name, node in cut.site.nodes.items()))
        key = (cut.placed.block, cut.placed.program, cut.site.kind, cut.site.label, nodes)
        if key in found:
            module = cut.placed.module
            raise SurgeryError("PSG315", f"'{adapter}' changes {module} more than once")
        if not cut.rule.params and not cut.rule.train:
            raise SurgeryError("PSG316", f"'{adapter}' has no parameters to combine")
        found[key] = cut
    return found


def _method(rule: Rule) -> Any:
    """Text key of a rule's effect, equal for rules that differ only in what they match."""
    parts: Iterable[Mapping[str, Any]] = (rule.let, rule.rewrite, rule.fold)
    shapes = {name: [str(size) for size in param.shape] for name, param in rule.params.items()}
    return [{n: str(e) for n, e in part.items()} for part in parts], shapes, rule.train


def _params(model: OperatedModel, cut: Cut) -> dict[str, Tensor]:
    return {name: model.get_parameter(full).detach() for name, full in cut.parameters.items()}


def _values(
    model: OperatedModel, form: Form, cut: Cut, row: Row, known: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The combination's values at one site, by their names in the new model."""
    names, values = cut.parameters, dict[str, Tensor]()
    new = {n for n, full in names.items() if full not in known}  # sites may share parameters
    if new:
        made = form.values(cut, row.shares)
        values |= {names[n]: value for n, value in made.items() if n in new}
    if cut.rule.train and cut.placed.parameter is not None:
        parameter = cut.placed.parameter
        base = _read(model, parameter)
        own = (share.cut.operation.name for share in row.shares)
        changes = [_read(model, parameter, adapter) - base for adapter in own]
        value = base + form.trained(cut, changes, [share.weight for share in row.shares])
        values[copy_name(parameter, cut.operation.name)] = value
    return values


def _read(model: OperatedModel, parameter: str, *adapters: str) -> Tensor:
    """What a call reads for a parameter of the base with these adapters alone."""
    with model.only(*adapters):
        return model.dense(parameter)


def _listed(names: Iterable[str]) -> str:
    return " and ".join(f"'{name}'" for name in names)
