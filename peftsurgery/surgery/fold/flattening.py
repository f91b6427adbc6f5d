"""flatten: re-parameterised methods in the form in which they are shipped.

A method that trains a small network to make its parameters (prefix tuning's perceptron, P-tuning's
encoder) needs the network only while it is trained, and one that keeps where it started (PiSSA)
can say what it learnt without. The rule file says under `flat:` which rules the trained method is,
and what it gives for their parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from peftsurgery.arguments import checked
from peftsurgery.errors import SurgeryError
from peftsurgery.language.evaluation import evaluate
from peftsurgery.language.loading import load_rules
from peftsurgery.language.readings import values_of
from peftsurgery.language.rule_file import RuleFile
from peftsurgery.language.settings import resolve_settings
from peftsurgery.surgery.applying import remade
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.plan.cut import Cut, Operation
from peftsurgery.surgery.rewrite.environment import TensorDomain, environment


@checked
def flatten(model: OperatedModel) -> OperatedModel:
    """Replace re-parameterised methods by the flat ones that they compute; outputs stay the same.

    Other adapters, and the model itself, stay as they are. PSG330 if the flat rules do not match
    the places that the method was applied to.
    """
    operations = [_flat(model, operation) for operation in model.operations]
    if all(new is old for new, old in zip(operations, model.operations, strict=True)):
        return model
    made = remade(model, operations)
    for old, new in zip(model.operations, operations, strict=True):
        if new is not old:
            _fill(made, _cuts(made, new), model, _cuts(model, old))
    return made


def _flat(model: OperatedModel, operation: Operation) -> Operation:
    """Flat form of an operation; the operation itself if it has none."""
    flat = operation.file.flat
    if flat is None:
        return operation
    file = _at_places_of(load_rules(flat.rule), _cuts(model, operation))
    settings = {name: operation.settings[name] for name in file.with_ if name in operation.settings}
    settings |= {name: evaluate(e, operation.settings) for name, e in flat.settings.items()}
    return replace(operation, file=file, settings=resolve_settings(file, settings))


def _at_places_of(file: RuleFile, cuts: Sequence[Cut]) -> RuleFile:
    """A rule file whose parameters go where the given cuts are."""
    rules = []
    for rule in file.rules:
        alike = [cut.rule for cut in cuts if cut.rule.match == rule.match]
        same = {"where": alike[0].where, "expect": alike[0].expect} if alike and rule.params else {}
        rules.append(rule.model_copy(update=same))
    return file.model_copy(update={"rules": tuple(rules)})


def _cuts(model: OperatedModel, operation: Operation) -> list[Cut]:
    """The cuts of an operation that have parameters."""
    return [cut for cut in model.cuts if cut.operation is operation and cut.rule.params]


@torch.no_grad()
def _fill(
    made: OperatedModel, cuts: Sequence[Cut], model: OperatedModel, sources: Sequence[Cut]
) -> None:
    """Give the flat parameters the values that the method computes for them."""
    modules = [[cut.placed.module for cut in each] for each in (cuts, sources)]
    if modules[0] != modules[1]:
        name = sources[0].operation.name if sources else cuts[0].operation.name
        raise SurgeryError(
            "PSG330",
            f"'{name}' was applied at {len(modules[1])} places, and its flat rules match "
            f"{len(modules[0])} others",
        )
    for cut, source in zip(cuts, sources, strict=True):
        flat = source.operation.file.flat
        assert flat is not None
        env = environment(source, TensorDomain(model.get_parameter))
        for name, value in values_of(flat.params, source.rule, env).items():
            parameter = made.get_parameter(cut.parameters[name])
            if parameter.shape != value.shape:
                raise SurgeryError(
                    "PSG330",
                    f"'{name}' of '{source.operation.name}' is {list(value.shape)} as a flat "
                    f"parameter, where {list(parameter.shape)} is needed",
                )
            parameter.copy_(value)
