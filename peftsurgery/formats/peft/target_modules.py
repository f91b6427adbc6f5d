"""target_modules: which modules a config means, and how to say which modules are meant.

peft reads a list of names as endings of module paths, a text as a regular expression for the whole
path, and "all-linear" as every linear but the head. It says nothing when one of several names
matches no module, or when tensors are left over; here both are errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftsurgery.capture.tensors import tensor_names
from peftsurgery.errors import SurgeryError, nearest
from peftsurgery.formats.peft.config import AdapterConfig, leaves
from peftsurgery.language.paths import full_match

ALL_LINEAR = "all-linear"
LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")
IN_LIST = re.compile(r"(?:.*?\.)?([^.]*)\.(\d+)\.")


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


def target_test(config: AdapterConfig) -> Callable[[str], bool]:
    """Whether a config means a module, by its path; as peft decides it."""
    wanted = config.values.get("target_modules")
    excluded = _name_test(config, "exclude_modules")
    saved = [full_match(rf"(.*\.)?{name}(\..*)?") for name in config.names("modules_to_save")]
    named = _name_test(config, "target_modules")
    in_layer = (lambda path: True) if isinstance(wanted, str) else _layer_test(config)

    def means(path: str) -> bool:
        if excluded(path) or any(holds(path) for holds in saved):
            return False
        exact = not isinstance(wanted, str) and path in (wanted or ())
        return exact or (named(path) and in_layer(path))

    return means


def _name_test(config: AdapterConfig, key: str) -> Callable[[str], bool]:
    value = config.values.get(key)
    if isinstance(value, str):
        return full_match(value)
    names = config.names(key)
    return lambda path: any(ends(path, name) for name in names)


def saved_whole(path: str, names: Iterable[str]) -> bool:
    """Whether a module is, or lies in, one that modules_to_save names by the end of its path."""
    parts = path.split(".")
    heads = (".".join(parts[: n + 1]) for n in range(len(parts)))
    return any(head.endswith(name) for head in heads for name in names)


def ends(path: str, name: str) -> bool:
    """Whether a path is a name or ends with it, at a dot."""
    return path == name or path.endswith(f".{name}")


def nearest_path(name: str, known: Collection[str]) -> str:
    """Hint with the nearest names, exact paths under another prefix first."""
    ending = [other for other in known if ends(other, name) or ends(name, other)]
    if ending:
        return f"did you mean '{max(ending, key=len)}'? the adapter was made for another class"
    return nearest(name, known) or "the adapter was made for another base"


def _layer_test(config: AdapterConfig) -> Callable[[str], bool]:
    """Whether a module is in one of the layers_to_transform, if the config names any."""
    layers = config.values.get("layers_to_transform")
    if layers is None or layers == []:
        return lambda path: True
    wanted = [layers] if isinstance(layers, int) else layers
    if not isinstance(wanted, list) or not all(isinstance(layer, int) for layer in wanted):
        raise SurgeryError("PSG503", "the adapter's layers_to_transform are no numbers")
    return lambda path: _is_in_layers(path, wanted, config.names("layers_pattern"))


def _is_in_layers(path: str, layers: Collection[int], lists: Collection[str]) -> bool:
    """Whether a module is in one of these layers of the lists of these names, or of any list."""
    patterns = [re.compile(rf"(?:^|.*?\.){re.escape(name)}\.(\d+)\.") for name in lists]
    found = (pattern.match(path) for pattern in patterns or [LAYER])
    first = next((match for match in found if match), None)
    return first is not None and int(first[1]) in layers


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
    meant = {module for module in covered if _is_listed(wanted, module)}
    for module in sorted(meant ^ set(listed)):
        verb = "does not mean" if module in listed else "means"
        message = f"{key} {verb} '{module}', and the shape of its tensor tells otherwise"
        raise SurgeryError("PSG508", message, f"correct {key}")


def _is_listed(wanted: list[str] | str, module: str) -> bool:
    """Whether such a list means an adapted module: peft looks at endings, dot or no dot."""
    if isinstance(wanted, str):
        return full_match(wanted)(module)
    return any(module.endswith(name) for name in wanted)


def say_listed(
    paths: Collection[str], adapted: Collection[str], targets: list[str] | str
) -> list[str] | str:
    """A list that means these of the adapted modules; a part of ``target_modules`` if it can be."""
    if isinstance(targets, list):
        names = [name for name in targets if any(ends(path, name) for path in paths)]
        if {module for module in adapted if _is_listed(names, module)} == set(paths):
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
    meant = {m for m in by_name if m in names or _is_in_layers(m, layers, lists)}
    if layered and layers and meant == set(paths):
        said = {"layers_to_transform": sorted(layers), "layers_pattern": sorted(lists)}
        return {"target_modules": sorted(names), **said}
    by_path = {m for m in modules if any(ends(m, path) for path in paths)}
    if by_path == set(paths):
        return {"target_modules": sorted(paths)}
    return {"target_modules": "|".join(re.escape(path) for path in sorted(paths))}
