"""target_parameters: adapters of stacks of matrices, which peft puts at parameters and not modules.

peft (0.21.2) wraps the module that has the parameters once for each of them, in the order in which
the module declares them, so the last one's adapter is the outermost:

    experts.lora_A.weight              for the last of the targeted parameters
    experts.base_layer.lora_A.weight   for the one before it

How the factors of all experts are kept is in ``stack_layout.py``. Only stacks of experts are read
and written; adapters of other parameters are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from peftsurgery.anatomy import Placed
from peftsurgery.capture.names import join
from peftsurgery.errors import SurgeryError, nearest
from peftsurgery.formats.exchange import AdapterPlan
from peftsurgery.formats.peft.adapter import PeftAdapter
from peftsurgery.formats.peft.config import PARAMETERS, STACKS, AdapterConfig
from peftsurgery.formats.peft.library import FORMAT
from peftsurgery.formats.peft.module_paths import ends, saved_whole
from peftsurgery.formats.peft.stack_layout import layout_of, uncertain
from peftsurgery.formats.peft.tensor_keys import WRAPPED, unwrapped
from peftsurgery.language.rule_file import RuleFile
from peftsurgery.language.schema import Expect
from peftsurgery.language.selection import select
from peftsurgery.language.settings import resolve_settings
from peftsurgery.language.where import Where
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.plan.cut import Cut, Operation
from peftsurgery.surgery.rewrite.readers import check_readers

Keys = Mapping[str, str]
Wrappers = dict[str, str]


def take_stacks(adapter: PeftAdapter, model: nn.Module) -> tuple[PeftAdapter, dict[str, Keys]]:
    """Tell adapters of parameters from those of modules.

    Returns the adapter with those of modules alone, and the keys of the others' tensors, by the
    parameter's name and by suffix. PSG508 unless the tensors are those that the config means,
    PSG504 for parameters of a module that is saved whole.
    """
    config, added, stacks = adapter.config, dict(adapter.names.added), dict[str, Keys]()
    for parameter, wrapper in _wanted(config, model).items():
        keys = added.pop(wrapper, None)
        if keys is None:
            message = f"{PARAMETERS} means '{parameter}', and the adapter has no tensors for it"
            raise SurgeryError("PSG508", message, "the file is incomplete")
        stacks[parameter] = keys
    has_modules = config.values.get("target_modules") != []
    for path in added if stacks else ():
        if unwrapped(path) != path or not has_modules:
            message = f"the adapter has tensors for '{path}', which {PARAMETERS} does not mean"
            raise SurgeryError("PSG508", message, "it lists other parameters than were trained")
    return replace(adapter, names=replace(adapter.names, added=added)), stacks


def _wanted(config: AdapterConfig, model: nn.Module) -> Wrappers:
    """The parameters that a config means, each of its names at least one."""
    wanted, saved = config.names(PARAMETERS), config.names("modules_to_save")
    known = [name for name, _ in model.named_parameters()] if wanted else []
    for name in wanted:
        if not any(ends(parameter, name) for parameter in known):
            message = f"{PARAMETERS} names '{name}', and no parameter of the model is called that"
            raise SurgeryError("PSG508", message, nearest(name, known))
    found = wrappers(wanted, model)
    for parameter in found:
        module = parameter.rpartition(".")[0]
        if not module or saved_whole(module, saved):
            message = f"{PARAMETERS} means '{parameter}', whose module peft wraps otherwise"
            raise SurgeryError("PSG504", message)
    return found


def wrappers(names: Collection[str], model: nn.Module) -> Wrappers:
    """The parameters with one of these names, or the end of a path, and their wrappers' paths."""
    found: Wrappers = {}
    for path, module in model.named_modules() if names else ():
        own = (join(path, name) for name, _ in module.named_parameters(recurse=False))
        meant = [parameter for parameter in own if any(ends(parameter, name) for name in names)]
        for depth, parameter in enumerate(reversed(meant)):
            found[parameter] = ".".join([path, *[WRAPPED] * depth])
    return found


def stacks_plan(
    stacks: Mapping[str, Keys],
    sites: Sequence[Placed],
    adapter: PeftAdapter,
    model: nn.Module,
    name: str,
) -> AdapterPlan:
    """The operations for what is added to stacks of experts. PSG506, PSG507."""
    groups: dict[tuple[Any, ...], tuple[RuleFile, dict[str, Any], list[Placed]]] = {}
    for parameter, keys in stacks.items():
        here = [site for site in sites if site.kind == STACKS and site.parameter == parameter]
        if not here:
            message = f"the tensor '{next(iter(keys.values()))}' is for '{parameter}'"
            why = "which is no stack of experts that these inputs reach"
            raise SurgeryError("PSG506", f"{message}, {why}")
        file = adapter.config.stack_file()
        settings = adapter.config.settings(file, parameter)
        for site in here:
            group = (site.role, site.facts["in"], site.facts["out"], tuple(settings.items()))
            groups.setdefault(group, (file, settings, []))[2].append(site)
    plan = AdapterPlan()
    for file, settings, here in groups.values():
        operation = _operation(file, settings, here, sites, name)
        cuts = [Cut(operation, operation.file.rules[0], site) for site in here]
        _check_alone(cuts, sites)
        known: dict[str, torch.Tensor] = {}
        for cut in cuts:
            known |= _values(cut, stacks[str(cut.placed.parameter)], adapter, model)
        plan.add(AdapterPlan([operation], cuts, known))
    return plan


def _operation(
    file: RuleFile,
    settings: Mapping[str, Any],
    here: Sequence[Placed],
    sites: Sequence[Placed],
    name: str,
) -> Operation:
    """The rule of stacks at just these sites. PSG507 if no clauses tell them from others."""
    paths = tuple(dict.fromkeys(site.module for site in here))
    first = here[0]
    where = Where(
        paths=paths,
        role=None if first.role is None else (first.role,),
        facts={size: int(first.facts[size]) for size in ("in", "out")},
    )
    update = {"where": where, "expect": Expect(at_least=len(paths))}
    rule = next(rule for rule in file.rules if rule.kind.name == STACKS).model_copy(update=update)
    given = resolve_settings(file, settings)
    others = [site for site in select(sites, rule, given).kept if site not in here]
    if others:
        message = f"'{others[0].parameter}' cannot be told from '{first.parameter}'"
        raise SurgeryError("PSG507", f"{message}, which alone is adapted")
    return Operation(file.model_copy(update={"rules": (rule,), "roles": {}}), given, name)


def _check_alone(cuts: Collection[Cut], sites: Iterable[Placed]) -> None:
    """Refuse a stack that is read elsewhere too: there, peft's update counts as well. PSG507."""
    try:
        check_readers(cuts, sites)
    except SurgeryError as error:
        message = f"the model reads '{next(iter(cuts)).placed.parameter}' in other ways too"
        raise SurgeryError("PSG507", message, "peft changes it for all that read it") from error


def _values(
    cut: Cut, keys: Keys, adapter: PeftAdapter, model: nn.Module
) -> dict[str, torch.Tensor]:
    """The parameters of a cut: the factors of each expert, out of peft's two matrices. PSG507."""
    parameter, suffixes = cut.placed.parameter, cut.rule.suffixes(FORMAT)
    odd = uncertain(cut, model)
    if odd is not None:
        hint = "merge with peft, and capture the merged model"
        raise SurgeryError("PSG507", f"'{parameter}' {odd}", hint)
    if set(suffixes.values()) != set(keys):
        odd = min(set(suffixes.values()) ^ set(keys))
        verb = "has" if odd in keys else "has no"
        raise SurgeryError("PSG507", f"the adapter of '{parameter}' {verb} '{odd}'")
    layout = layout_of(cut, model)
    factors = [adapter.tensors[keys[suffix]] for suffix in suffixes.values()]
    for suffix, factor, shape in zip(suffixes.values(), factors, layout.shapes, strict=True):
        if tuple(factor.shape) != shape:
            given = list(factor.shape)
            message = (
                f"'{keys[suffix]}' has shape {given}, where base and config need {list(shape)}"
            )
            hint = "it was made for another base, or the config has another rank"
            raise SurgeryError("PSG507", message, hint)
    return {cut.parameters[n]: v for n, v in zip(suffixes, layout.split(*factors), strict=True)}


def say_parameters(parameters: Collection[str], model: nn.Module) -> tuple[list[str], Wrappers]:
    """The names that mean just these parameters, and where their tensors are. PSG510 if none do."""
    short = sorted({".".join(parameter.split(".")[-2:]) for parameter in parameters})
    for names in (short, sorted(parameters)):
        found = wrappers(names, model)
        if found.keys() == set(parameters):
            return names, found
    message = f"no names are those of '{min(parameters)}' and its kin alone"
    raise SurgeryError("PSG510", message, "save the surgery itself with save(), or fold it")


def say_factors(model: OperatedModel, cut: Cut) -> dict[str, torch.Tensor]:
    """The factors of a stack's adapter as peft keeps them, by suffix. PSG510 if it cannot."""
    base, suffixes = model.source.module, cut.rule.suffixes(FORMAT)
    odd = uncertain(cut, base)
    if odd is not None:
        hint = "save the surgery itself with save(), or fold it"
        raise SurgeryError("PSG510", f"'{cut.placed.parameter}' {odd}", hint)
    factors = [model.get_parameter(cut.parameters[name]).detach() for name in suffixes]
    return dict(zip(suffixes.values(), layout_of(cut, base).join(*factors), strict=True))
