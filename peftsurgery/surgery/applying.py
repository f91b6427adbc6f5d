"""apply and eject: from captured model to operated model and back."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from peftsurgery.arguments import checked
from peftsurgery.capture import GraphModel
from peftsurgery.errors import SurgeryError, check_argument
from peftsurgery.language.loading import load_rules
from peftsurgery.language.rule_file import RuleFile
from peftsurgery.language.schema import Rule
from peftsurgery.language.settings import check_settings, resolve_settings, settings_of
from peftsurgery.language.where import Where
from peftsurgery.surgery.model.adapters import Layers, check_name
from peftsurgery.surgery.model.changed_inputs import ChangedInputs
from peftsurgery.surgery.model.learnt import Learnt
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.model.shared import operations_of, unoperated
from peftsurgery.surgery.plan.cut import Operation, adapter_name
from peftsurgery.surgery.plan.fusion import check_unused
from peftsurgery.surgery.plan.narrowing import by_given, check_narrowed, narrowed, where_given
from peftsurgery.surgery.plan.origin import Origin
from peftsurgery.surgery.plan.plan import check_plan, make_plan
from peftsurgery.surgery.plan.token_settings import with_tokens
from peftsurgery.surgery.rewrite.inputs import changes_inputs, check_inputs
from peftsurgery.surgery.rewrite.shapes import check_shapes, unlike

Rules = RuleFile | Rule | str | Path


def apply(
    model: GraphModel,
    rules: Rules | Sequence[Rules],
    name: str | None = None,
    *,
    train: str | Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    where: Mapping[str, Any] | Where | None = None,
    by: Sequence[Mapping[str, Any]] = (),
    exact: bool | None = None,
    **keywords: Any,
) -> OperatedModel:
    """Apply rules to a model, and return the operated model; ``model`` itself is unchanged.

    ``rules`` are rule files, shipped names, paths or single rules, applied in order. ``settings``
    override those of the rule files, and so do further keywords (``rank=16``); ``name`` is what the
    adapter is called (the rule file's name unless given). ``train`` names modules or parameters of
    the model, by the ends of their paths, that are trained whole besides, such as a new head; they
    belong to the last adapter. A setting that holds tokens (``init_tokens``) may be given as a text
    (``init_text``). ``where`` narrows every rule to some of its sites, by the clauses that rule
    files have (``{"layers": "4..", "role": ["attn.q"]}``); ``by`` gives other settings at some:
    ``[{"where": {"layers": "0..3"}, "rank": 16}]``, the first entry that fits a site. What rules
    expect is said of them before they are narrowed. New values agree with the rules' text to a few
    rounding errors; an ``exact`` model computes operation by operation, as the text says. Unless it
    is given, the new model does as ``model``. Raises PSG301 or PSG302 if a rule matches nothing or
    not what it expects, or if narrowing leaves nothing, PSG120 for a setting no rule has, PSG121
    for a setting's value, PSG126 for a text without a tokenizer, PSG304 if the name is taken,
    PSG904 for an argument of the wrong type.
    """
    if not isinstance(model, GraphModel):
        message = f"rules are applied to a captured model, not to a {type(model).__name__}"
        raise SurgeryError("PSG309", message, "capture it first: apply(capture(model), rules)")
    check_argument("apply(name=)", name, (str, type(None)), "the name of an adapter")
    check_argument("apply(exact=)", exact, (bool, type(None)), "True or False")
    files = [_rule_file(each) for each in (rules if isinstance(rules, list | tuple) else [rules])]
    values = _merged(settings, keywords)
    check_settings(files, values)
    values = with_tokens(values, {name for file in files for name in file.with_}, model.source)
    place, entries = where_given(where), by_given(by, files)
    origin = Origin(seed=torch.initial_seed())
    whole = [_operation(file, name, values, origin) for file in files]
    groups = [narrowed(operation, place, entries) for operation in whole]
    operations = [operation for group in groups for operation in group]
    if parts := _names_of(train):
        file = _training(parts)
        owner = operations[-1].name if operations else _name_for(file, name)
        operations.append(Operation(file, {}, owner, origin))
    operated = operate(model, operations, exact=exact)
    check_narrowed(groups, operated.cuts, operated.base_capture)
    return operated


def operate(
    model: GraphModel,
    operations: Iterable[Operation],
    known: Mapping[str, torch.Tensor] = MappingProxyType({}),
    active: Collection[str] | None = None,
    left_out: Layers = MappingProxyType({}),
    lost: Mapping[str, float] = MappingProxyType({}),
    exact: bool | None = None,
) -> OperatedModel:
    """Add operations to a model; ``known`` gives parameter values instead of initial ones.

    What was active stays so, and of the new adapters those in ``active`` are: all unless given.
    ``left_out`` are layers in which they do nothing, ``lost`` the shares that they lack of what
    they were combined of. An operation under a name that is there already belongs to that adapter.
    ``exact`` is that of :func:`apply`.
    """
    added = list(operations)
    before = learnt_by(model)
    wanted = {operation.name for operation in added} if active is None else active
    learnt = Learnt(
        {**before.values, **known},
        {*before.active, *wanted},
        {**before.left_out, **left_out},
        before.trains,
        {**before.lost, **lost},
        before.exact if exact is None else exact,
    )
    return carried_out(model, [*operations_of(model), *added], learnt)


@checked
def eject(model: GraphModel, name: str | None = None) -> GraphModel:
    """Take the operations out again: returns the captured model, its graphs and weights untouched.

    With ``name``, only that adapter is taken out. Raises PSG310 if there is none of that name,
    PSG342 if another adapter is over it.
    """
    operations = operations_of(model)
    if name is not None:
        check_name(name, (operation.name for operation in operations))
    rest = [op for op in operations if name is not None and op.name != name]
    check_unused(str(name), rest)
    return remade(model, rest) if rest and isinstance(model, OperatedModel) else unoperated(model)


def remade(model: OperatedModel, operations: Sequence[Operation]) -> OperatedModel:
    """Rebuild a model with these operations; learnt values and active adapters stay.

    Parameters of an operation that is gone are not taken over by another under their names.
    """
    before, kept = learnt_by(model), {operation.name for operation in operations}
    gone = {n for c in model.cuts if c.operation not in operations for n in c.parameters.values()}
    learnt = Learnt(
        {name: value for name, value in before.values.items() if name not in gone},
        {*before.active} & kept,
        {name: layers for name, layers in before.left_out.items() if name in kept},
        before.trains,
        {name: share for name, share in before.lost.items() if name in kept},
        before.exact,
    )
    return carried_out(model, operations, learnt)


def carried_out(
    model: GraphModel, operations: Sequence[Operation], learnt: Learnt
) -> OperatedModel:
    """Carry out exactly these operations on a model's base: plan, check, make.

    Raises what :func:`apply` raises of them.
    """
    inputs = ChangedInputs.of(operations, model.source.module)
    plan = make_plan(operations, inputs.planned(model.base_capture, model.original_capture))
    check_plan(plan, (name for name, _ in unoperated(model).named_parameters()))
    for cut in unlike(plan.distinct_cuts):
        check_inputs(cut) if changes_inputs(cut) else check_shapes(cut)
    return OperatedModel(model, plan, inputs, learnt)


def learnt_by(model: GraphModel) -> Learnt:
    """State to carry over into a model made of this one; empty for a captured model."""
    return model.all_learnt() if isinstance(model, OperatedModel) else Learnt()


def check_taken(
    source: str,
    operated: OperatedModel,
    model: GraphModel,
    operations: Iterable[Operation],
    known: Mapping[str, torch.Tensor],
) -> None:
    """Refuse parameter values that new operations lack or do not take. Raises PSG311."""
    old = set(map(operated.own_name, learnt_by(model).values))
    given = dict(known)
    operated.take_names(given, [operation.name for operation in operations])
    check_covered(source, operated.learnt().keys() - old, given.keys() - old)


def check_covered(source: str, wanted: Iterable[str], given: Iterable[str]) -> None:
    """Refuse missing or left-over tensors, as of another model. Raises PSG311."""
    missing, left = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if missing or left:
        parts = [f"{len(missing)} are missing ('{missing[0]}')"] if missing else []
        parts += [f"{len(left)} have no place ('{left[0]}')"] if left else []
        message = f"'{source}' does not fit this model: of its tensors, {' and '.join(parts)}"
        raise SurgeryError("PSG311", message, "it was made for another base")


def _training(parts: Sequence[str]) -> RuleFile:
    """Make rules that train whole parts of the model, named by the ends of their paths."""
    paths = [rf"(.*\.)?{re.escape(part)}(\..*)?" for part in parts]
    rules = [Rule(match="parameter", where=Where(path=path), train=True) for path in paths]
    return RuleFile(name="trained", about="Parts of the model, trained whole.", rules=tuple(rules))


def _rule_file(rules: Any) -> RuleFile:
    if isinstance(rules, RuleFile):
        return rules
    if isinstance(rules, Rule):
        return RuleFile(name="custom", rules=(rules,))
    check_argument(
        "apply(rules)", rules, (str, Path), "rule files, shipped names, paths or single rules"
    )
    return load_rules(rules)


def _operation(
    file: RuleFile, name: str | None, values: Mapping[str, Any], origin: Origin
) -> Operation:
    """A rule file under an adapter's name, its own unless given, with the settings that it has."""
    settings = resolve_settings(file, settings_of(file, values))
    return Operation(file, settings, _name_for(file, name), origin)


def _name_for(file: RuleFile, name: str | None) -> str:
    """The name of an adapter: that of its rule file unless given."""
    return adapter_name(file.name if name is None else name)


def _merged(settings: Mapping[str, Any] | None, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Merge settings and keywords. Raises PSG121 for one given in both ways."""
    if settings is None:
        return dict(keywords)
    check_argument("apply(settings=)", settings, Mapping, "a dict of settings by name")
    for name in settings:
        check_argument("apply(settings=)", name, str, "texts as the names of settings")
    twice = sorted(settings.keys() & keywords.keys())
    if twice:
        message = f"the setting '{twice[0]}' is given twice, in settings= and as a keyword"
        raise SurgeryError("PSG121", message)
    return {**settings, **keywords}


def _names_of(train: str | Sequence[str]) -> list[str]:
    wanted = "names of modules or parameters"
    parts = [train] if isinstance(train, str) else train
    check_argument("apply(train=)", parts, (list, tuple, set, frozenset), wanted)
    for part in parts:
        check_argument("apply(train=)", part, str, wanted)
    return list(parts)
