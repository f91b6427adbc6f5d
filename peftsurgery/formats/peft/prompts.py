"""Virtual tokens in peft's files: one tensor for the whole model, and no wrappers around modules.

What peft does with them depends on the task that the config names, and for an unknown task it
ignores them. The task is told by the model's class. P-tuning's encoder is not in the files: they
hold what it computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peftsurgery.errors import SurgeryError
from peftsurgery.formats.peft.config import FORMAT, flat_form
from peftsurgery.formats.peft.files import BASE
from peftsurgery.formats.peft.needed_base import TASKS
from peftsurgery.formats.peft.tensor_keys import without_wrapper
from peftsurgery.formats.peft.trained_modules import say_trained
from peftsurgery.language import RuleFile
from peftsurgery.surgery.fold.flattening import flatten
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.plan.cut import Cut

# What peft's config says of the model, by the names that transformers has for it.
FACTS: Mapping[str, str] = {
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
}


def is_prompt(model: OperatedModel, name: str) -> bool:
    """Whether an adapter puts virtual tokens into the text."""
    return any(cut.rule.kind.resizes for cut in model.cuts if cut.operation.name == name)


def export_prompt(
    model: OperatedModel, name: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config and the tensors of virtual tokens. PSG510 for what peft has no form for."""
    form = next(
        flat_form(cut.operation.file)
        for cut in model.cuts
        if cut.operation.name == name and cut.rule.kind.resizes
    )
    flat = flatten(model)
    cuts = [cut for cut in flat.cuts if cut.operation.name == name]
    prompts = [cut for cut in cuts if cut.rule.params]
    if len(prompts) != 1:
        raise _refuse(name, "is virtual tokens and more, and peft has either under one name")
    cut = prompts[0]
    _check_form(cut, form)
    base = model.source.module
    config = form.identifying(FORMAT) | {
        key: cut.operation.settings[setting] for key, setting in form.carried(FORMAT).items()
    }
    trained = {str(c.placed.parameter) for c in cuts if c.rule.train}
    said = say_trained(flat, trained, [], has_bias=False)
    config |= {"task_type": task_of(name, base), "token_dim": cut.sizes["width"], **_facts(base)}
    config |= {"modules_to_save": said.modules or None, "inference_mode": True}
    config[BASE] = model.source.origin
    table = cut.rule.suffixes(FORMAT)
    tensors = {table[n]: flat.get_parameter(full) for n, full in cut.parameters.items()}
    heads = {without_wrapper(key): value for key, value in said.tensors.items()}
    return config, tensors | heads


def _check_form(cut: Cut, form: RuleFile) -> None:
    """Refuse a rule of which peft's files cannot say everything."""
    name = cut.operation.name
    if set(cut.rule.suffixes(FORMAT)) != set(cut.rule.params) or not form.identifying(FORMAT):
        raise _refuse(name, f"is of the rule file '{cut.operation.file.name}', unknown to peft")
    for setting in _settings_read(cut):
        value, usual = cut.operation.settings[setting], cut.operation.file.with_[setting]
        if setting not in form.carried(FORMAT).values() and value != usual:
            raise _refuse(name, f"has {setting} = {value!r}, and peft knows only {usual!r}")


def _settings_read(cut: Cut) -> list[str]:
    """The settings that the rule's new values depend on, through `let` names too."""
    let = cut.operation.file.let
    pending = [*cut.rule.reads()]
    seen: dict[str, None] = {}
    while pending:
        name = pending.pop()
        seen[name] = None
        pending += [n for n in let[name].names if n not in seen] if name in let else ()
    return [name for name in seen if name in cut.operation.file.with_]


def task_of(name: str, base: nn.Module) -> str:
    """What peft calls the task of a model, by its class. PSG510 if it is none of peft's."""
    kind = type(base).__name__
    for task, classes in TASKS.items():
        if kind in classes.values():
            return task
    raise _refuse(name, f"is on a {kind}, and peft has virtual tokens for no such task")


def _facts(base: nn.Module) -> dict[str, int]:
    config = getattr(base, "config", None)
    found = {key: getattr(config, fact, None) for key, fact in FACTS.items()}
    return {key: value for key, value in found.items() if isinstance(value, int)}


def _refuse(name: str, why: str) -> SurgeryError:
    return SurgeryError("PSG510", f"'{name}' {why}", "save the surgery itself with save()")
