"""Cuts at the parts of a fused weight as one adapter of the whole, for a library that has no parts.

With A_q, B_q for the query rows of a fused W and A_v, B_v for its value rows:

    A = [A_q]      B = [B_q   0 ]  query rows
        [A_v]          [ 0    0 ]  key rows
                       [ 0   B_v]  value rows

so B A is B_q A_q in the query rows, B_v A_v in the value rows, and 0 elsewhere. No method is known
here: a parameter's shape says which of its dims is the rank (they are stacked) and which the rows
(they are put in their place); what no part fills keeps its initial value. That the result is the
same change of the weight is then computed, with the rule's own fold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from peftsurgery.errors import SurgeryError
from peftsurgery.formats.peft.library import FORMAT, peft_words
from peftsurgery.language.parameter_axes import axes_of
from peftsurgery.language.readings import fold, initial_values, weights_read
from peftsurgery.language.rule_file import RuleFile
from peftsurgery.language.settings import resolve_settings
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.plan.cut import Cut, Operation
from peftsurgery.surgery.rewrite.environment import TensorDomain, environment

Tensors = dict[str, torch.Tensor]
# relative to the weight: parameters made from it (a norm of its rows) are rounded to fp32
EXACT, ROUNDED = 1e-12, 2e-7


def fuse(model: OperatedModel, cuts: Sequence[Cut]) -> tuple[Cut, Tensors]:
    """One cut at the whole weight, and the values of its parameters by the rule's names.

    Raises PSG510 if the parts cannot be one adapter of the whole.
    """
    first = cuts[0]
    if any(_algebra(cut) != _algebra(first) for cut in cuts):
        raise _refuse(first, "its parts are adapted by different rules")
    settings = _settings(cuts)
    assert first.site.whole is not None
    whole = replace(first.placed, site=first.site.whole)
    operation = Operation(first.operation.file, settings, first.operation.name)
    cut = Cut(operation, first.rule, whole)
    model.bind()
    names = environment(cut, TensorDomain(model.dense))
    needed = (weights_read(param, first.rule) for param in first.rule.params.values())
    values = {name: names[name] for name in frozenset().union(*needed)}
    start = initial_values(first.rule, {**cut.numbers, **values}, {})
    tensors = {name: _fused(model, cut, cuts, name, value) for name, value in start.items()}
    _check(model, cut, cuts, tensors, values)
    return cut, tensors


def _algebra(cut: Cut) -> Any:
    """What a rule does, whatever it matches."""
    parts = {"match", "let", "params", "rewrite", "fold", "checkpoint"}
    let = {name: str(value) for name, value in cut.operation.file.let.items()}
    return cut.rule.model_dump(mode="json", include=parts), let


def _settings(cuts: Sequence[Cut]) -> dict[str, Any]:
    """Settings of the whole: ranks add up, and the numbers of the rule file stay what they are."""
    first = cuts[0]
    file = first.operation.file
    rank, alpha = _summed(file), file.carried(FORMAT).get(peft_words().parts["scaled"])
    own = first.operation.own_settings
    for cut in cuts:
        for name in {*file.with_, *file.let} - {rank, alpha}:
            if cut.operation.settings[name] != first.operation.settings[name]:
                raise _refuse(first, f"its parts differ in '{name}'")
    if rank is None:
        return resolve_settings(file, own)
    own[rank] = sum(cut.operation.settings[rank] for cut in cuts)
    scaled = resolve_settings(file, own)
    changed = [n for n in file.let if scaled[n] != first.operation.settings[n]]
    if changed and alpha is not None:
        value = own[alpha] * (first.operation.settings[changed[0]] / scaled[changed[0]])
        own[alpha] = int(value) if value == int(value) else value
    return resolve_settings(file, own)


def _summed(file: RuleFile) -> str | None:
    """The setting that adds up over the parts: the rank."""
    return file.carried(FORMAT).get(peft_words().parts["added"])


def _fused(
    model: OperatedModel, whole: Cut, cuts: Sequence[Cut], name: str, fused: torch.Tensor
) -> torch.Tensor:
    """A parameter of the whole: the parts where their shapes say, its initial value elsewhere."""
    rank = _summed(whole.operation.file)
    stacked = next(iter(axes_of(whole.rule, name, [rank] if rank else [])), None)
    rows = next(iter(axes_of(whole.rule, name, ["out"])), None)
    offset = 0
    for cut in cuts:
        part = model.get_parameter(cut.parameters[name]).detach().to(fused.device)
        region = fused
        if stacked is not None:
            region = fused.narrow(stacked, offset, part.shape[stacked])
            offset += part.shape[stacked]
        if rows is not None and cut.site.slice is not None:
            part = cut.site.slice.put(region, rows, part)
        if part.shape != region.shape:
            raise _refuse(whole, f"its parts have no place in the whole's '{name}'")
        region.copy_(part)
    return fused


def _check(
    model: OperatedModel,
    whole: Cut,
    cuts: Sequence[Cut],
    tensors: Tensors,
    values: Mapping[str, Any],
) -> None:
    """Compare the folds on one weight, random unless initial values came from the model's."""
    weights = _examples(whole, values)
    together = weights | _folded(whole, weights, tensors)
    for cut in cuts:
        rows = cut.site.slice
        assert rows is not None
        part = {name: rows.take(weight, 0) for name, weight in weights.items()}
        own = {name: model.get_parameter(full).detach() for name, full in cut.parameters.items()}
        changed = _folded(cut, part, own)
        weights |= {name: rows.put(weights[name], 0, value) for name, value in changed.items()}
    for name, weight in weights.items():
        bound = (ROUNDED if values else EXACT) * weight.abs().max()
        if (together[name] - weight).abs().max() > bound:
            raise _refuse(whole, "its parts together are not one adapter of the whole")


def _examples(whole: Cut, values: Mapping[str, Any]) -> Tensors:
    """The weight and the bias of a site, random unless their values are given."""
    generator = torch.Generator().manual_seed(0)
    facts = whole.placed.facts
    shapes = {"W": (facts["out"], facts["in"]), "b": (facts["out"],)}
    return {
        name: values.get(name, torch.randn(shape, generator=generator)).double().cpu()
        for name, shape in shapes.items()
        if name in whole.site.nodes
    }


def _folded(cut: Cut, weights: Tensors, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """What a cut makes of the weights that are there, with these values of its parameters."""
    given = {name: tensor.double().cpu() for name, tensor in tensors.items()}
    absent = dict.fromkeys(cut.rule.kind.weights, 0.0)
    changed = fold(cut.rule, {**cut.numbers, **absent, **weights, **given})
    return {name: value for name, value in changed.items() if name in weights}


def _refuse(cut: Cut, why: str) -> SurgeryError:
    message = f"'{cut.placed.module}' is one fused weight for peft, and {why}"
    hint = "apply the rule to the whole weight (where: {paths: [...]}), or save the surgery itself"
    return SurgeryError("PSG510", message, hint)
