"""The model's own parameters that an adapter trains, as peft says it.

``bias: all`` and ``bias: lora_only`` are every bias of the model, or those of the adapted modules;
anything else is a module saved whole, under ``modules_to_save``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import nn

from peftsurgery.capture.tensors import tensor_names
from peftsurgery.errors import SurgeryError
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
    return any(path == module or path.startswith(f"{module}.") for path in adapted)


def _parameters(base: nn.Module, module: str) -> list[str]:
    """The parameters of a module, by their names in the model."""
    part = base.get_submodule(module)
    return [f"{module}.{name}" for name, _ in part.named_parameters(remove_duplicate=False)]
