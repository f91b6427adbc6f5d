"""What folding a model's active adapters does to its parameters, as plain data."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from peftsurgery.capture.sources import build_on_meta
from peftsurgery.capture.stacked_files import stacked_pieces
from peftsurgery.capture.tensors import tensor_names
from peftsurgery.capture.tie_flags import FLAG, reread, untied_flags, with_parts
from peftsurgery.checkpoint.model_plan import IN_MEMORY, ModelPlan
from peftsurgery.checkpoint.plan import SiteFold, without_repeats
from peftsurgery.checkpoint.row_wise import has_lines, line_axes, row_axes
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
    computed of others, and for ties that cannot be broken by what config.json says.
    """
    cuts = fold_cuts(model)
    sites = [_site_fold(cut) for cut in cuts]
    changed = {name for site in sites for name in site.changed}
    changed |= {*trained}
    ties = _ties(module, model, changed)
    read = sorted(changed | {name for site in sites for name in site.weights.values()})
    return ModelPlan(
        sites=tuple(without_repeats(sites)),
        replaced={name: _copy_of(name, active, learnt) for name in trained},
        shapes={name: tuple(module.get_parameter(name).shape) for name in read},
        stacks=stacked_pieces(module, read) if isinstance(module, PreTrainedModel) else {},
        ties=ties,
        untied=_untied(module, ties),
        body=str(getattr(module, "base_model_prefix", "")),
        library=isinstance(module, PreTrainedModel),
    )


def _ties(
    module: nn.Module, model: Foldable, changed: Collection[str]
) -> tuple[tuple[str, ...], ...]:
    """The groups of names that are one tensor; none if no fold changes a tensor of a group.

    Names that no graph reads go wherever the others go.
    """
    groups = dict[tuple[str, ...], None]()
    for names in tensor_names(module).values():
        silent = {alias for name in names for alias in model.aliases(name)}
        groups[tuple(name for name in names if name not in silent)] = None
    found = tuple(group for group in groups if len(group) > 1)
    return found if any(not group.isdisjoint(changed) for group in map(set, found)) else ()


def _untied(module: nn.Module, ties: Collection[Collection[str]]) -> dict[str, Any]:
    """What config.json says of a model whose tied weights are written apart. PSG416 if it cannot.

    What counts is what the class makes of that config, so it is made, without weights.
    """
    flags = untied_flags(module) if isinstance(module, PreTrainedModel) and ties else {}
    if ties and not flags:
        what = f"a {type(module).__name__} has no config that says that they are apart"
        raise SurgeryError("PSG416", f"the fold would break a tie, and {what}", IN_MEMORY)
    found = {f"{path}.{FLAG}".lstrip("."): False for path in flags or ()}
    if found:
        assert isinstance(module, PreTrainedModel)
        config = copy.deepcopy(module.config)
        for path, part in with_parts(config):
            if path in (flags or ()):
                setattr(part, FLAG, False)
        config.architectures = [type(module).__name__]
        again = tensor_names(build_on_meta(reread(config)))
        left = [names for names in ties if any(len(again.get(name, ())) > 1 for name in names)]
        for names in left:
            why = f"{', '.join(names)} stay one weight of a {type(module).__name__}"
            raise SurgeryError("PSG416", f"the fold would break a tie, and {why}", IN_MEMORY)
    return found


def _copy_of(parameter: str, adapters: Iterable[str], learnt: Collection[str]) -> str:
    """The name of the trained copy of a parameter among what was learnt."""
    names = (copy_name(parameter, adapter) for adapter in adapters)
    return next((name for name in names if name in learnt), parameter)


def _site_fold(cut: Cut) -> SiteFold:
    """One cut as plain data."""
    rule, site = cut.rule, cut.site
    part, is_turned = site.slice, bool(site.turned)
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
        lines=line_axes(rule, cut.numbers, is_turned) if has_lines(rule, is_turned) else None,
    )


def _axes(cut: Cut, name: str) -> Axes:
    """The order of the stored axes in which they make a computed weight. PSG416 for another."""
    found = axes_of(cut.site.nodes[name])
    if found is None:
        why = f"the weight of '{cut.placed.module}' is computed of {', '.join(cut.made[name])}"
        raise SurgeryError("PSG416", why, IN_MEMORY)
    return found
