"""Methods whose parameters are one tensor of the whole model in peft's files, and no module's.

    prompt_embeddings (tokens, width)                           virtual tokens before the text
    prompt_embeddings (length, 2 layers kv_heads head_dim)      a prefix: for each token the keys of
                                                                the first layer, its values, ...

A rule's `checkpoint` says so by a / before the name. peft wraps no modules for these. It hands a
prefix to the model as what it remembers of the text before, so it is at every core of
self-attention, and the text's positions come after it. Of an encoder-decoder only the decoder has
one, and its layer i has number 2 i mod layers: peft (0.21.2) repeats the tensor for the cross
attention, cuts it in fours, and then clears what would be the cross attention's. What it does with
virtual tokens depends on the task, which is told by the model's class. P-tuning's encoder is not in
the files: they hold what it computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peftsurgery.capture import GraphModel
from peftsurgery.errors import SurgeryError
from peftsurgery.formats.exchange import (
    AdapterPlan,
    check_implied,
    config_of,
    is_paired,
    meant_operation,
    not_known,
)
from peftsurgery.formats.joined_tensors import JoinedTensor, joined_tensors, values_of
from peftsurgery.formats.peft.adapter import PeftAdapter
from peftsurgery.formats.peft.config import AdapterConfig
from peftsurgery.formats.peft.files import BASE
from peftsurgery.formats.peft.library import FORMAT, LIBRARY, WholeMethod, peft_words
from peftsurgery.formats.peft.needed_base import classes_of
from peftsurgery.formats.peft.tensor_keys import without_wrapper
from peftsurgery.formats.peft.trained_modules import say_trained
from peftsurgery.formats.peft.window_notes import window_notes
from peftsurgery.language.evaluation import evaluate
from peftsurgery.language.expression import parse
from peftsurgery.language.rule_file import RuleFile
from peftsurgery.language.schema import Rule
from peftsurgery.reach import reach
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.plan.cut import Cut


def is_whole(rules: Iterable[Rule]) -> bool:
    """Whether parameters of some of these rules are in one tensor of the whole model."""
    return any(name.startswith("/") for rule in rules for name in rule.suffixes(FORMAT).values())


def prefix_notes(model: GraphModel, cuts: Iterable[Cut]) -> tuple[str, ...]:
    """What a reader should know of the tokens that an adapter puts before the keys of attention."""
    found = _tensors([cut for cut in cuts if cut.rule.params and is_whole([cut.rule])])
    lengths = (joined.shape[0] for joined in found.values() if joined.beside)
    return next((window_notes(model, length) for length in lengths), ())


def _tensors(cuts: Iterable[Cut]) -> dict[str, JoinedTensor]:
    """The tensors of an adapter by their keys."""
    return joined_tensors(cuts, lambda rule: rule.suffixes(FORMAT), lambda _, key: key[1:], flat=1)


def whole_plan(model: GraphModel, adapter: PeftAdapter, name: str) -> AdapterPlan:
    """The operation that an adapter without modules is. PSG506 to PSG508 if it does not fit.

    Of methods with the same config, the one that does least: what another trains besides has
    tensors of its own.
    """
    file = min(adapter.config.files, key=lambda file: len(file.rules))
    settings = adapter.config.settings(file, "")
    operation, cuts = meant_operation(model, file, settings, name, FORMAT)
    if not cuts:
        raise SurgeryError("PSG507", f"the model has nowhere what a {file.name} is for")
    wanted, given = _tensors(cuts), adapter.names.added
    if set(given) != {""} or set(given[""]) != set(wanted):
        found = ", ".join(f"'{key}'" for keys in given.values() for key in keys.values())
        found = found or f"'{next(iter(adapter.tensors))}'"
        names = " and ".join(f"'{key}'" for key in wanted)
        message = f"an adapter of this method is {names} of the whole model, and the file has"
        raise SurgeryError("PSG506", f"{message} {found}")
    known = values_of(wanted, {key: adapter.tensors[full] for key, full in given[""].items()})
    _check_facts(adapter.config, _said_of(model, cuts, _method(file).compared))
    return AdapterPlan([operation], cuts, known)


def whole_files(
    model: OperatedModel, cuts: Sequence[Cut], form: RuleFile
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config and the tensors of an adapter without modules. PSG510 for what peft has not.

    ``cuts`` are those of the adapter, in its flat form, and ``form`` the rule file as which peft
    knows it.
    """
    added = [cut for cut in cuts if cut.rule.params]
    operation, base = added[0].operation, model.source.module
    if not all(is_whole([cut.rule]) for cut in added):
        raise _refuse(operation.name, "is virtual tokens and more, and peft has either")
    _check_settings(added[0], form)
    trained = {str(cut.placed.parameter) for cut in cuts if cut.rule.train}
    said = say_trained(model, trained, [], has_bias=False)
    tensors = _meant_tensors(model, added)
    method = _method(form)
    config = config_of(operation, form, FORMAT) | {"task_type": _task_of(operation.name, base)}
    config |= _said_of(model, added, {**method.compared, **method.said})
    config |= {"modules_to_save": said.modules or None, "inference_mode": True}
    config[BASE] = model.source.origin
    return config, tensors | {without_wrapper(key): value for key, value in said.tensors.items()}


def _method(form: RuleFile) -> WholeMethod:
    kind = str(form.identifying(FORMAT).get("peft_type"))
    return peft_words().whole.get(kind, WholeMethod())


def _said_of(model: GraphModel, cuts: Sequence[Cut], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What config keys say of a model; those are left out for which it has no numbers."""
    sizes = {**cuts[0].sizes, "sites": len(cuts), "paired": is_paired(model)}
    about, found = getattr(model.source.module, "config", None), {}
    for key, value in facts.items():
        if not isinstance(value, str):
            found[key] = value
            continue
        expression = parse(value)
        known = {name: sizes.get(name, getattr(about, name, None)) for name in expression.names}
        if all(isinstance(number, int) for number in known.values()):
            found[key] = evaluate(expression, known)
    return found


def _check_facts(config: AdapterConfig, facts: Mapping[str, Any]) -> None:
    """Refuse a config that was made for a model of another kind. PSG508."""
    for key, ours in facts.items():
        theirs = config.values.get(key)
        if theirs is not None and theirs != ours:
            message = f"the adapter's {key} is {theirs!r}, and this model's is {ours}"
            raise SurgeryError("PSG508", message, "the adapter was made for another base")


def _check_settings(cut: Cut, form: RuleFile) -> None:
    """Refuse settings that the outputs depend on, and of which peft's files say nothing."""
    operation = cut.operation
    check_implied(operation, FORMAT, LIBRARY, "PSG510")
    said = {*form.carried(FORMAT).values(), *operation.file.implied(FORMAT)}
    let = operation.file.let
    read = {*reach(cut.rule.reads(), lambda name: let[name].names if name in let else ())}
    for setting in sorted(read & (operation.file.with_.keys() - said)):
        usual = operation.file.with_[setting]
        if operation.settings[setting] != usual:
            raise not_known(operation, setting, usual, LIBRARY, "PSG510")


def _meant_tensors(model: OperatedModel, cuts: Sequence[Cut]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter that is just where peft has it.

    PSG510 if it is elsewhere, or if sites differ that have one part of the tensor in peft.
    """
    own = cuts[0].operation
    carried = {name: own.settings[name] for name in own.file.carried(FORMAT).values()}
    operation, theirs = meant_operation(model, own.file, carried, own.name, FORMAT)
    if [cut.placed.module for cut in theirs] != [cut.placed.module for cut in cuts]:
        what = f"is at {len(cuts)} sites, and peft's is at {len(theirs)}: all of self-attention"
        raise _refuse(own.name, f"{what} in an encoder or a decoder, the decoder's of both")
    values: dict[str, torch.Tensor] = {}
    holders: dict[str, str] = {}
    hint = ", ".join(f"{n}={operation.settings[n]!r}" for n in own.file.implied(FORMAT))
    for cut, meant in zip(cuts, theirs, strict=True):
        for param, full in meant.parameters.items():
            value = model.get_parameter(cut.parameters[param]).detach()
            if not torch.equal(values.setdefault(full, value), value):
                places = f"'{holders[full]}' and '{cut.placed.module}'"
                raise _refuse(
                    own.name,
                    f"differs at {places}, which have one part of its tensor in peft",
                    f"train it with {hint}, or save the surgery itself with save()",
                )
            holders.setdefault(full, cut.placed.module)
    return {key: joined.join(values) for key, joined in _tensors(theirs).items()}


def _task_of(name: str, base: nn.Module) -> str:
    """What peft calls the task of a model, by its class. PSG510 if it is none of peft's."""
    kind = type(base).__name__
    for task in peft_words().tasks:
        if kind in classes_of(task).values():
            return task
    raise _refuse(name, f"is on a {kind}, and peft has virtual tokens for no such task")


def _refuse(name: str, why: str, hint: str = "save the surgery itself with save()") -> SurgeryError:
    return SurgeryError("PSG510", f"'{name}' {why}", hint)
