"""The model's own parameters that an adapter trains, as peft says it: read and written.

``bias: all`` and ``bias: lora_only`` are every bias of the model, or those of the adapted modules;
anything else is a module saved whole, under ``modules_to_save``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from peftsurgery.anatomy import survey
from peftsurgery.capture import GraphModel
from peftsurgery.capture.builds import tables
from peftsurgery.capture.names import is_within
from peftsurgery.capture.tensors import tensor_names
from peftsurgery.errors import SurgeryError
from peftsurgery.formats.exchange import AdapterPlan, training
from peftsurgery.formats.joined_tensors import JoinedTensor
from peftsurgery.formats.peft.adapter import PeftAdapter
from peftsurgery.formats.peft.library import peft_words
from peftsurgery.formats.peft.module_paths import saved_whole
from peftsurgery.formats.peft.target_modules import nearest_path
from peftsurgery.formats.peft.tensor_keys import own_key
from peftsurgery.surgery.model.operated import OperatedModel


@dataclass(frozen=True)
class Trained:
    """The values of ``bias`` and ``modules_to_save``, and the tensors that go with them."""

    bias: str = "none"
    modules: list[str] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def say_trained(
    model: OperatedModel, trained: Collection[str], adapted: Collection[str], has_bias: bool = True
) -> Trained:
    """How peft says that these parameters are trained. PSG510 if it cannot.

    ``adapted`` are the modules that carry adapters; peft cannot save such a module whole.
    ``has_bias`` says whether the method's config has a ``bias``.
    """
    base = model.source.module
    aliases = tensor_names(base)
    biases = {
        next((alias for alias in aliases[name] if alias in trained), name)
        for name, _ in base.named_parameters()
        if name.endswith(".bias")
    }
    choices = {
        "all": biases,
        "lora_only": {name for name in biases if name.rpartition(".")[0] in set(adapted)},
        "none": set[str](),
    }
    for word, meant in choices.items() if has_bias else [("none", set[str]())]:
        rest = {name.rpartition(".")[0] for name in set(trained) - meant}
        fits = meant <= set(trained) and (meant or word == "none")
        if fits and (word == "none" or not any(_holds(module, adapted) for module in rest)):
            break
    modules = sorted(rest)
    for module in modules:
        _check_saved(base, module, adapted)
    names = {*meant, *(name for module in modules for name in _parameters(base, module))}
    tensors = {own_key(name, adapted): model.dense(name) for name in names}
    return Trained(word, modules, tensors)


def _check_saved(base: nn.Module, module: str, adapted: Collection[str]) -> None:
    """Refuse a module that peft cannot save whole, or could not tell from others."""
    reason = None
    if not module or _holds(module, adapted):
        reason = "peft cannot train parameters of a module that has an adapter"
    elif any(True for _ in base.get_submodule(module).buffers()):
        reason = "it has buffers, which an adapter here does not hold"
    names = (name for name, _ in base.named_modules(remove_duplicate=False))
    other = next((n for n in names if module and n.endswith(module) and n != module), None)
    if other is not None:
        reason = f"peft would take '{other}' for it, since it looks at endings of names"
    if reason is not None:
        raise SurgeryError("PSG510", f"'{module}' was trained, and {reason}", "save the surgery")


def _holds(module: str, adapted: Collection[str]) -> bool:
    """Whether a module has an adapter, or holds one that has."""
    return any(is_within(path, module) for path in adapted)


def _parameters(base: nn.Module, module: str) -> list[str]:
    """The parameters of a module, by their names in the model."""
    part = base.get_submodule(module)
    return [f"{module}.{name}" for name, _ in part.named_parameters(remove_duplicate=False)]


def trained_plan(model: GraphModel, adapter: PeftAdapter, name: str) -> AdapterPlan:
    """The operations that train the model's own parameters that an adapter brings along.

    PSG506 for a tensor that is none of those, PSG507 for one that is the base's and differs from
    it, PSG508 for a module that is to be saved whole and of which there is no tensor.
    """
    module, names, values = model.source.module, adapter.names, adapter.config.values
    _check_covered(module, adapter)
    groups: dict[str, list[str]] = {"modules_to_save": [], "bias": []}
    known = tables(module)
    for parameter in names.own:
        owner, _, leaf = parameter.rpartition(".")
        if adapter.trains(parameter, module):
            groups["modules_to_save"].append(parameter)
        elif leaf == "bias" and values.get("bias", "none") != "none":
            groups["bias"].append(parameter)
        elif owner in names.added or owner in known:
            _check_base(model, adapter, parameter, names.own[parameter])
        else:
            raise _homeless(module, adapter, parameter)
    for parameter, key in names.frozen.items():
        _check_base(model, adapter, parameter, key)
    plan = AdapterPlan()
    for group, own in groups.items():
        if own:
            plan.add(_training_plan(model, adapter, own, group, name))
    return plan


def _check_covered(model: nn.Module, adapter: PeftAdapter) -> None:
    """Refuse a module that is to be saved whole and of which there is no tensor. PSG508."""
    task = peft_words().tasks.get(str(adapter.config.values.get("task_type")))
    owners = {name.rpartition(".")[0] for name in adapter.names.own}
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for name in adapter.config.names("modules_to_save"):
        exists = any(module.endswith(name) for module in modules)
        covered = any(saved_whole(owner, [name]) for owner in owners)
        if covered or (task is not None and name in task.heads and not exists):
            continue
        message = f"modules_to_save names '{name}', and the adapter has no tensors for it"
        raise SurgeryError("PSG508", message, None if exists else nearest_path(name, modules))


def _training_plan(
    model: GraphModel, adapter: PeftAdapter, names: Sequence[str], group: str, adapter_name: str
) -> AdapterPlan:
    """An operation that trains parameters of the model, with the adapter's values for them."""
    module = model.source.module
    read = {site.parameter for site in survey(model.base_capture) if site.kind == "parameter"}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    aliases = tensor_names(module)
    known: dict[str, torch.Tensor] = {}
    for name in names:
        # a tied parameter goes by the name that the graph reads it by
        path = next((a for a in (name, *aliases.get(name, ())) if a in read), None)
        if path is None or name not in parameters:
            raise _homeless(module, adapter, name)
        value = _shaped(adapter, adapter.names.own[name], parameters[name])
        known[path] = value.to(parameters[name].dtype)
    about = "Parameters of the model that came with a peft adapter."
    return AdapterPlan([training(known, group, about, adapter_name)], [], known)


def _shaped(adapter: PeftAdapter, key: str, parameter: torch.Tensor) -> torch.Tensor:
    """The tensor of a key, for a parameter. PSG507 if it has another shape."""
    joined = JoinedTensor({key: tuple(parameter.shape)}, [key])
    return joined.split(key, adapter.tensors[key])[key]


def _check_base(model: GraphModel, adapter: PeftAdapter, name: str, key: str) -> None:
    """The copy that peft saves of a weight of the base must be this base's. PSG507.

    Of two dtypes the coarser counts: the adapter may be of a base read in another.
    """
    base = model.source.weights() if model.source.is_readable else model.source.module
    mine = dict(base.named_parameters(remove_duplicate=False)).get(name)
    if mine is None:
        raise _homeless(model.source.module, adapter, name)
    value = _shaped(adapter, key, mine)
    if mine.is_meta:
        return
    coarse = max((value.dtype, mine.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    if not torch.equal(value.to(coarse), mine.detach().cpu().to(coarse)):
        message = f"'{key}' is the weight of the adapter's base, and '{name}' differs from it"
        hint = "the adapter was made for another base; if it was trained, name its module in "
        raise SurgeryError("PSG507", message, f"{hint}modules_to_save")


def _homeless(model: nn.Module, adapter: PeftAdapter, name: str) -> SurgeryError:
    """The refusal of a tensor that is no parameter the captured model reads."""
    key = adapter.names.own[name]
    known = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    if name in known:
        message = f"the tensor '{key}' is for a parameter that the adapter's config leaves out"
        return SurgeryError("PSG506", message, "see its bias and modules_to_save")
    return SurgeryError("PSG506", f"the tensor '{key}' has no place", nearest_path(name, known))
