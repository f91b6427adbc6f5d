"""target_modules: which modules a config means, and how to say which modules are meant.

peft reads a list of names as endings of module paths, a text as a regular expression for the whole
path, and "all-linear" as every linear but the head. It says nothing when one of several names
matches no module, or when tensors are left over; here both are errors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftsurgery.capture.tensors import tensor_names
from peftsurgery.errors import SurgeryError, nearest
from peftsurgery.formats.peft.config import AdapterConfig, leaves
from peftsurgery.formats.peft.module_paths import (
    IN_LIST,
    ends,
    is_in_layers,
    is_listed,
    target_test,
)

ALL_LINEAR = "all-linear"


def check_targets(config: AdapterConfig, model: nn.Module, covered: Collection[str]) -> None:
    """Refuse a config that names other modules than the file has tensors for. PSG508.

    ``covered`` are the paths of the modules that the tensors are for.
    """
    wanted = config.values.get("target_modules")
    if not wanted:
        return  # the tensors are all there is to go by
    modules = [name for name, _ in model.named_modules() if name]
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        targets = linears(model, config.names("modules_to_save"))
    else:
        meant = target_test(config)
        targets = {module for module in modules if meant(module)}
        if config.values.get("ensure_weight_tying"):
            targets |= {path for target in targets for path in tied(model, target)}
        if not isinstance(wanted, str):
            _check_each(config.names("target_modules"), modules)
    for module in sorted(targets - set(covered)):
        message = f"target_modules means '{module}', and the adapter has no tensors for it"
        raise SurgeryError("PSG508", message, "the file is incomplete, or for another base")
    for module in sorted(set(covered) - targets):
        message = f"the adapter has tensors for '{module}', which target_modules does not mean"
        raise SurgeryError("PSG508", message, "peft would ignore them; correct target_modules")


def tied(model: nn.Module, path: str) -> set[str]:
    """The modules whose weight is that of the module at a path, itself among them."""
    names = tensor_names(model).get(f"{path}.weight", [])
    return {name.rpartition(".")[0] for name in names}


def nearest_path(name: str, known: Collection[str]) -> str:
    """Hint with the nearest names, exact paths under another prefix first."""
    ending = [other for other in known if ends(other, name) or ends(name, other)]
    if ending:
        return f"did you mean '{max(ending, key=len)}'? the adapter was made for another class"
    return nearest(name, known) or "the adapter was made for another base"


def unlike(model: nn.Module, path: str) -> str | None:
    """Reason why peft's adapter of this convolution is no change of its kernel; None if it is.

    Its A is a convolution of the same kernel, stride and padding, but never in groups, never
    dilated, and always padded with zeros (0.21.2). Where the module's own is none of that, B A read
    as a kernel, which is what peft merges, is another function than the one that was trained. A
    dilation of a single tap and a way to pad by nothing make no difference.
    """
    module = model.get_submodule(path)
    if not isinstance(module, nn.modules.conv._ConvNd):
        return None
    taps = [at for at, size in enumerate(module.kernel_size) if size > 1]
    if isinstance(module.padding, str):
        padded = module.padding == "same" and bool(taps)
    else:
        padded = any(module.padding)
    what = None
    if module.groups != 1:
        what = f"in {module.groups} groups"
    elif any(module.dilation[at] != 1 for at in taps):
        what = f"with a dilation of {tuple(module.dilation)}"
    elif module.padding_mode != "zeros" and padded:
        what = f"padded in {module.padding_mode} mode"
    return None if what is None else f"is a convolution {what}, where peft differs"


def _check_each(names: Iterable[str], modules: list[str]) -> None:
    for name in names:
        if not any(ends(module, name) for module in modules):
            known = {*leaves(modules)} if "." not in name else set(modules)
            message = f"target_modules names '{name}', and no module of the model is called that"
            raise SurgeryError("PSG508", message, nearest(name, known))


def linears(model: nn.Module, but: Iterable[str] = ()) -> set[str]:
    """What "all-linear" means: every linear module but the head and what is saved whole."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    but = list(but)
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
        if not any(ends(name, part) for part in but)
    }


def check_listed(
    config: AdapterConfig, key: str, listed: Collection[str], covered: Collection[str]
) -> None:
    """Refuse a list of modules that is not the one the tensors' shapes tell of. PSG508.

    ``listed`` are the adapted modules that the list should mean, ``covered`` all of them.
    """
    value = config.values.get(key)
    if value is None:
        return  # peft looks it up by the model's type; the tensors are all there is to go by
    wanted = value if isinstance(value, str) else config.names(key)
    meant = {module for module in covered if is_listed(wanted, module)}
    for module in sorted(meant ^ set(listed)):
        verb = "does not mean" if module in listed else "means"
        message = f"{key} {verb} '{module}', and the shape of its tensor tells otherwise"
        raise SurgeryError("PSG508", message, f"correct {key}")


def say_listed(
    paths: Collection[str], adapted: Collection[str], targets: list[str] | str
) -> list[str] | str:
    """A list that means these of the adapted modules; a part of ``target_modules`` if it can be."""
    if isinstance(targets, list):
        names = [name for name in targets if any(ends(path, name) for path in paths)]
        if {module for module in adapted if is_listed(names, module)} == set(paths):
            return names
    return "|".join(re.escape(path) for path in sorted(paths))


def say_targets(paths: Collection[str], modules: Collection[str], layered: bool) -> dict[str, Any]:
    """The keys that mean exactly these paths among a model's modules.

    ``target_modules`` are the last names if they are enough, or in some layers if the method is
    ``layered``, else the paths, else a regular expression: peft takes every name of a list for an
    ending.
    """
    names = leaves(paths)
    inside = [match for path in paths if (match := IN_LIST.match(path))]
    layers, lists = {int(match[2]) for match in inside}, {match[1] for match in inside}
    by_name = {m for m in modules if any(ends(m, name) for name in names)}
    if by_name == set(paths):
        return {"target_modules": sorted(names)}
    meant = {m for m in by_name if m in names or is_in_layers(m, layers, lists)}
    if layered and layers and meant == set(paths):
        said = {"layers_to_transform": sorted(layers), "layers_pattern": sorted(lists)}
        return {"target_modules": sorted(names), **said}
    by_path = {m for m in modules if any(ends(m, path) for path in paths)}
    if by_path == set(paths):
        return {"target_modules": sorted(paths)}
    return {"target_modules": "|".join(re.escape(path) for path in sorted(paths))}
