"""From an operation to AdapterHub's files: the config and the tensors of the rule file's tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import SurgeryError
from ..surgery import Cut, OperatedModel, Operation
from .adapterhub_config import expected
from .adapterhub_library import FORMAT, architectures, parts, unflattened, version
from .adapterhub_places import Places
from .adapterhub_tensors import stacks

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Written:
    """The config and the tensors of an adapter, and those of the head that was trained with it."""

    config: dict[str, Any]
    tensors: Tensors
    head: Tensors = field(default_factory=dict)


def export(model: OperatedModel, name: str) -> Written:
    """An adapter as the library saves it. PSG512 for what it has no form for, PSG513 without names.

    Every parameter that was trained must be the adapter's or the head's.
    """
    cuts = [cut for cut in model.cuts if cut.operation.name == name]
    added = [cut for cut in cuts if cut.rule.params or cut.rule.rewrite]
    places = Places(model)
    operation = _only_operation(name, added)
    flat = expected(operation.file) | {
        key: operation.settings[setting] for key, setting in operation.file.carried(FORMAT).items()
    }
    for prefix, architecture in architectures(flat).items():
        kind = parts()[architecture].kind
        sites = [cut.placed for cut in added if cut.rule.kind.name == kind]
        said = places.said(kind, list(dict.fromkeys(sites)))
        flat |= {f"{prefix}{key}": value for key, value in said.items()}
    values = model.learnt()
    tensors = {
        places.full(key): stack.join(values) for key, stack in stacks(added, places, name).items()
    }
    config = {"config": unflattened(flat), "name": name, **about(model)}
    return Written(config, tensors, _head(model, places, cuts))


def about(model: OperatedModel) -> dict[str, Any]:
    """What a config says of the model and the library."""
    module: Any = model.source.module
    return {
        "model_type": module.config.model_type,
        "model_class": type(module).__name__,
        "model_name": model.source.origin or "",
        "hidden_size": module.config.hidden_size,
        "version": version(),
    }


def _only_operation(name: str, cuts: Sequence[Cut]) -> Operation:
    """The operation of an adapter's cuts, all of which the library has names for. PSG512."""
    for cut in cuts:
        if set(cut.rule.suffixes(FORMAT)) != set(cut.rule.params) or not cut.rule.params:
            file = cut.operation.file.name
            raise _refuse(f"the rule file '{file}' has no form in AdapterHub's library")
    operations = list(dict.fromkeys(cut.operation for cut in cuts))
    if not operations:
        raise _refuse(f"'{name}' adds no parameters, and AdapterHub has no such method")
    if len(operations) > 1:
        files = " and ".join(operation.file.name for operation in operations)
        raise _refuse(f"'{name}' is made of {files}, and AdapterHub's adapter is one method")
    return operations[0]


def _head(model: OperatedModel, places: Places, cuts: Sequence[Cut]) -> Tensors:
    """The model's own parameters that were trained: the head's, or PSG512."""
    names = {str(cut.placed.parameter) for cut in cuts if cut.rule.train}
    for name in sorted(names):
        if not places.headed or name.startswith(places.prefix):
            raise _refuse(f"'{name}' was trained, and AdapterHub keeps only the head's parameters")
    base = dict(model.source.module.named_parameters(remove_duplicate=False))
    heads = [n for n in base if not n.startswith(places.prefix)] if names else []
    return {n: model.get_parameter(n).detach().cpu() for n in heads}


def _refuse(message: str) -> SurgeryError:
    return SurgeryError("PSG512", message, "save the surgery itself with save(), or fold it")
