"""What folding a model's active adapters does to its parameters, as plain data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import nn
from transformers import PreTrainedModel

from peftsurgery.capture.tensors import tensor_names
from peftsurgery.checkpoint.model_plan import IN_MEMORY, ModelPlan
from peftsurgery.checkpoint.plan import SiteFold, without_repeats
from peftsurgery.checkpoint.row_wise import row_axes
from peftsurgery.errors import SurgeryError
from peftsurgery.surgery.plan.cut import Cut, copy_name
from peftsurgery.surgery.rewrite.computed_weights import Axes, axes_of
from peftsurgery.surgery.rewrite.folded_weights import Foldable, fold_cuts


def model_plan(
    module: nn.Module,
    model: Foldable,
    trained: Collection[str],
    active: Collection[str],
    learnt: Collection[str],
) -> ModelPlan:
    """Plan the fold of a model's ``active`` adapters, by the names of its ``module``.

    ``trained`` are the parameters of the base that they train, ``learnt`` the names of all tensors
    that they hold. Raises PSG401 and PSG408 for what cannot be folded, PSG416 for a weight that is
    computed of others.
    """
    cuts = fold_cuts(model)
    sites = [_site_fold(cut) for cut in cuts]
    changed = {name for site in sites for name in site.changed}
    ties, changed = tensor_names(module), changed | {*trained}
    read = sorted(changed | {name for site in sites for name in site.weights.values()})
    return ModelPlan(
        sites=tuple(without_repeats(sites)),
        replaced={name: _copy_of(name, active, learnt) for name in trained},
        shapes={name: tuple(module.get_parameter(name).shape) for name in read},
        tied=_tied(ties, sorted(changed)),
        body=str(getattr(module, "base_model_prefix", "")),
        library=isinstance(module, PreTrainedModel),
    )


def _tied(ties: Mapping[str, Iterable[str]], changed: Iterable[str]) -> dict[str, list[str]]:
    """The other names of parameters that change."""
    others = {name: [each for each in ties[name] if each != name] for name in changed}
    return {name: names for name, names in others.items() if names}


def _copy_of(parameter: str, adapters: Iterable[str], learnt: Collection[str]) -> str:
    """The name of the trained copy of a parameter among what was learnt."""
    names = (copy_name(parameter, adapter) for adapter in adapters)
    return next((name for name in names if name in learnt), parameter)


def _site_fold(cut: Cut) -> SiteFold:
    """One cut as plain data."""
    rule, site = cut.rule, cut.site
    part = site.slice
    axes = {name: _axes(cut, name) for name in cut.made}
    if "pointwise" in site.facts:
        order = tuple(range(2 + site.facts["pointwise"]))
        axes["W"] = (order, (-1, site.facts["in"]))
    weights = cut.weights | {name: names[0] for name, names in cut.made.items()}
    return SiteFold(
        adapter=cut.operation.name,
        module=cut.placed.module,
        weights=weights,
        parameters=cut.parameters,
        numbers=cut.numbers,
        fold=rule.fold,
        let=rule.let,
        absent=tuple(name for name in rule.kind.weights if name not in site.nodes),
        turned=site.turned,
        axes=axes,
        slice=None if part is None else (part.start, part.length, part.period, part.groups),
        rows=row_axes(rule, cut.numbers),
    )


def _axes(cut: Cut, name: str) -> Axes:
    """The order of the stored axes in which they make a computed weight. PSG416 for another."""
    found = axes_of(cut.site.nodes[name])
    if found is None:
        why = f"the weight of '{cut.placed.module}' is computed of {', '.join(cut.made[name])}"
        raise SurgeryError("PSG416", why, IN_MEMORY)
    return found
