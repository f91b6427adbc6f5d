"""Writing of peft adapters: from operations to config and tensors.

A method without modules is one tensor, see ``whole_model.py``. Of others, every cut of the adapter
becomes a module's tensors; parts of a fused weight become one adapter of the whole. Where modules
differ in rank or alpha, patterns say so. Parameters of the model that were trained become ``bias``
and ``modules_to_save``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftsurgery.errors import SurgeryError
from peftsurgery.formats.exchange import config_of
from peftsurgery.formats.peft.beside import kept_beside, wrapped_key
from peftsurgery.formats.peft.config import PARAMETERS, STACKS
from peftsurgery.formats.peft.files import BASE
from peftsurgery.formats.peft.fused_weights import fuse
from peftsurgery.formats.peft.library import FORMAT, Beside, flat_form, listings, peft_words
from peftsurgery.formats.peft.module_paths import saved_whole
from peftsurgery.formats.peft.needed_base import class_said, saved_tables
from peftsurgery.formats.peft.rank_patterns import PATTERN, check_total, gather
from peftsurgery.formats.peft.target_modules import say_listed, say_targets, unlike
from peftsurgery.formats.peft.target_parameters import say_factors, say_parameters
from peftsurgery.formats.peft.tensor_keys import added_key, without_wrapper
from peftsurgery.formats.peft.trained_modules import Trained, say_trained
from peftsurgery.formats.peft.whole_model import is_whole, prefix_notes, whole_files
from peftsurgery.language.rule_file import RuleFile
from peftsurgery.language.schema import Rule
from peftsurgery.surgery.fold.flattening import flatten
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.plan.cut import Cut
from peftsurgery.surgery.rewrite.readers import check_readers

WRAPPABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, Conv1D)


@dataclass(frozen=True)
class Adapted:
    """Adapter of one module in peft's form: config keys, tensors by suffix, and rule.

    Of a stack of matrices, ``module`` is the name of the parameter: peft's config speaks of both
    alike.
    """

    module: str
    keys: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    rule: Rule


def peft_contents(
    model: OperatedModel, name: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor], tuple[str, ...]]:
    """The config and the tensors of an adapter as peft saves it, and notes for the reader.

    With the tables of a base that has another vocabulary than its files. PSG510 for what peft has
    no form for.
    """
    forms = [flat_form(operation.file) for operation in model.operations if operation.name == name]
    flat = flatten(model)
    cuts = [cut for cut in flat.cuts if cut.operation.name == name]
    added = [cut for cut in cuts if cut.rule.params]
    form = next((form for form in forms if is_whole(form.rules)), None)
    if form is None:
        config, tensors = _wrapped(flat, cuts, name)
        return config, saved_tables(model, {cut.placed.module for cut in added}) | tensors, ()
    for cut in added:
        _check_form(cut, form)
    config, tensors = whole_files(flat, cuts, form)
    tables = {without_wrapper(key): value for key, value in saved_tables(model, ()).items()}
    return config, tables | tensors, prefix_notes(model, cuts)


def _wrapped(
    model: OperatedModel, cuts: Sequence[Cut], name: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config and the tensors of an adapter of modules."""
    groups = [group for group in _by_place(cuts) if group[0].rule.params]
    if not groups:
        raise SurgeryError("PSG510", f"'{name}' adds no parameters, and peft has no such method")
    tied = _tied(groups)
    adapted = [_adapted(model, group) for group in groups if group[0].placed.module in tied]
    adapted, others = _apart(adapted)
    stacks = [one.module for one in adapted if one.rule.kind.name == STACKS]
    paths = [one.module for one in adapted if one.module not in stacks]
    base = model.source.module
    modules = [path for path, _ in base.named_modules() if path]
    config = _merge(name, adapted)
    config |= say_targets(paths, modules, bool(peft_words().patterns.keys() & config.keys()))
    targets = config["target_modules"]
    listed = {one.module: one.rule.listing(FORMAT) for one in adapted}
    for key in sorted(listings(cut.operation.file for cut in cuts)):
        config[key] = say_listed([path for path in paths if listed[path] == key], paths, targets)
    pattern, values = gather((one.module, one.rule, one.tensors) for one in adapted)
    config |= {PATTERN: pattern} if pattern else {}
    names, wrapped = say_parameters(stacks, base) if stacks else ([], {})
    tensors = {
        added_key(wrapped.get(module, module), suffix): value if module == one else value.clone()
        for one, of_module in values.items()
        for module in tied.get(one, [one])
        for suffix, value in of_module.items()
    }
    trained = {str(cut.placed.parameter) for cut in cuts if cut.rule.train}
    said, keys = _trained(model, trained, paths, config)
    config |= keys
    if any(isinstance(base.get_submodule(path), Conv1D) for path in paths):
        config["fan_in_fan_out"] = True
    config |= _with_parameters(name, names, stacks, config) if stacks else {}
    config |= {BASE: model.source.origin, **class_said(base), "inference_mode": True}
    for one, (key, beside) in others:
        config.setdefault(key, {})[one.module] = one.keys[beside.carries]
        tensors |= {wrapped_key(beside, one.module, s): v for s, v in one.tensors.items()}
    return config, tensors | said.tensors


def _trained(
    model: OperatedModel, trained: Collection[str], paths: Collection[str], config: dict[str, Any]
) -> tuple[Trained, dict[str, Any]]:
    """What peft has for parameters that were trained, and the keys that say so.

    A rule file whose method has no such key in peft says null for it, which ``config`` loses.
    """
    has = {key: config.pop(key, key) is not None for key in ("bias", "modules_to_save")}
    said = say_trained(model, trained, paths, has["bias"])
    if said.modules and not has["modules_to_save"]:
        why = f"'{said.modules[0]}' was trained, and peft saves no modules with this method"
        raise SurgeryError("PSG510", why, "save the surgery")
    keys = {"bias": said.bias, "modules_to_save": said.modules or None}
    return said, {key: value for key, value in keys.items() if has[key]}


def _tied(groups: Iterable[Sequence[Cut]]) -> dict[str, list[str]]:
    """The modules with adapters, each with those whose weight and adapter are the same tensors.

    Of these, peft's config means the first, and its files have all.
    """
    alike: dict[tuple[str, ...], list[str]] = {}
    for first, *_ in groups:
        alike.setdefault(tuple(first.parameters.values()), []).append(first.placed.module)
    return {modules[0]: modules for modules in alike.values()}


def _apart(
    adapted: Sequence[Adapted],
) -> tuple[list[Adapted], list[tuple[Adapted, tuple[str, Beside]]]]:
    """The adapters of a config's own method, and those of others that it has beside them."""
    found = [(one, kept_beside(one.keys)) for one in adapted]
    others = [(one, kept) for one, kept in found if kept is not None]
    if len(others) == len(found):
        return list(adapted), []
    return [one for one, kept in found if kept is None], others


def _with_parameters(
    name: str, names: Sequence[str], stacks: Sequence[str], config: Mapping[str, Any]
) -> dict[str, Any]:
    """The key that lists parameters. PSG510 if the config has what peft has not at parameters."""
    for key in peft_words().without_parameters:
        if config.get(key) not in (None, False, 0, "none"):
            message = f"'{name}' has {key} = {config[key]!r}, and '{stacks[0]}' is a stack"
            hint = "peft has no such adapters of stacks; save the surgery itself with save()"
            raise SurgeryError("PSG510", message, hint)
    for stack in stacks:
        if saved_whole(stack.rpartition(".")[0], config.get("modules_to_save") or ()):
            message = f"'{name}' adapts '{stack}' in a module that it trains whole"
            raise SurgeryError("PSG510", message, "save the surgery itself with save()")
    return {PARAMETERS: list(names)}


def _by_place(cuts: Iterable[Cut]) -> list[list[Cut]]:
    """The cuts at each module or stack, and at a layer that is called twice only one of the two."""
    groups: dict[str, dict[Any, Cut]] = {}
    for cut in cuts:
        if cut.rule.params or cut.rule.rewrite:
            key = (cut.operation, id(cut.rule), cut.site.slice)
            is_stack = cut.rule.kind.name == STACKS
            place = str(cut.placed.parameter) if is_stack else cut.placed.module
            groups.setdefault(place, {}).setdefault(key, cut)
    return [list(group.values()) for group in groups.values()]


def _adapted(model: OperatedModel, cuts: Sequence[Cut]) -> Adapted:
    """Translate one place's cuts into peft's form."""
    first = cuts[0]
    for cut in cuts:
        _check_form(cut, cut.operation.file)
        check_total(cut)
    if first.rule.kind.name == STACKS:
        return _adapted_stack(model, cuts)
    _check_module(model.source.module, first)
    if all(cut.site.slice is not None for cut in cuts):
        whole, values = fuse(model, cuts)
    elif len(cuts) == 1:
        whole = first
        values = {n: model.get_parameter(full) for n, full in first.parameters.items()}
    else:
        raise _refuse(first, "is adapted more than once under this name")
    table = whole.rule.suffixes(FORMAT)
    keys = config_of(whole.operation, whole.operation.file, FORMAT)
    tensors = {table[n]: _as_kernel(first, value) for n, value in values.items()}
    return Adapted(first.placed.module, keys, tensors, whole.rule)


def _as_kernel(cut: Cut, value: Tensor) -> Tensor:
    """A matrix as the kernel that peft has of it at a convolution. PSG510 for another value."""
    taps = cut.site.facts.get("pointwise")
    if taps is None:
        return value
    if value.dim() != 2:
        raise _refuse(cut, "is a convolution, and what is added to it is no matrix")
    return value[(..., *[None] * taps)]


def _adapted_stack(model: OperatedModel, cuts: Sequence[Cut]) -> Adapted:
    """Translate the cut at a stack into peft's form."""
    first = cuts[0]
    if len(cuts) > 1:
        raise _refuse(first, "is adapted more than once under this name")
    check_readers([c for c in model.cuts if c.rule is first.rule], model.foldable().sites)
    keys = config_of(first.operation, first.operation.file, FORMAT)
    return Adapted(str(first.placed.parameter), keys, say_factors(model, first), first.rule)


def _check_form(cut: Cut, form: RuleFile) -> None:
    """Refuse a rule for whose parameters the rule file lists no names in peft."""
    table = cut.rule.suffixes(FORMAT)
    if not cut.rule.params or set(table) != set(cut.rule.params) or not form.identifying(FORMAT):
        message = f"the rule file '{cut.operation.file.name}' has no form in peft"
        hint = "it says so under `checkpoint: peft`; save the surgery itself with save()"
        raise SurgeryError("PSG510", message, hint)


def _check_module(base: nn.Module, cut: Cut) -> None:
    """Refuse a place that peft cannot wrap, or where torch would never call what it wraps."""
    path = cut.placed.module
    parameter = (cut.placed.parameter or "").rpartition(".")[2]
    if not isinstance(base.get_submodule(path), WRAPPABLE) or parameter != "weight":
        kind = type(base.get_submodule(path)).__name__
        raise _refuse(cut, f"is a {kind} with '{parameter}', which peft cannot wrap")
    odd = unlike(base, path)
    if odd is not None:
        raise _refuse(cut, odd)
    parents = path.split(".")[:-1]
    for end in range(len(parents) + 1):
        owner = base.get_submodule(".".join(parents[:end]))
        if isinstance(owner, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            kind = type(owner).__name__
            raise _refuse(cut, f"is in a {kind}, whose code reads the weight and not the wrapper")


def _merge(name: str, adapted: Sequence[Adapted]) -> dict[str, Any]:
    """One config for all modules: patterns where it may differ, else one value. PSG510."""
    config: dict[str, Any] = {}
    patterns = peft_words().patterns
    for key in dict.fromkeys(key for one in adapted for key in one.keys):
        # a switch that a rule file does not mention is off
        off = {key: False} if peft_words().absent.get(key) is False else {}
        given = {one.module: {**off, **one.keys} for one in adapted}
        values = {module: keys[key] for module, keys in given.items() if key in keys}
        given_values = list(values.values())
        usual = max(given_values, key=given_values.count)
        config[key] = usual
        odd = {module: value for module, value in values.items() if value != usual}
        if odd and key in patterns:
            config[patterns[key]] = {f"^{re.escape(path)}": value for path, value in odd.items()}
        elif odd:
            module, value = next(iter(odd.items()))
            raise SurgeryError(
                "PSG510",
                f"'{name}' has {key} = {usual!r} and, at '{module}', {value!r}, and peft has one "
                "value for an adapter",
            )
    return config


def _refuse(cut: Cut, why: str) -> SurgeryError:
    return SurgeryError(
        "PSG510", f"'{cut.placed.module}' {why}", "save the surgery itself with save(), or fold it"
    )
