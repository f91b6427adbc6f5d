"""Writing of AdapterHub adapters: from an operation to config and tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from peftsurgery.errors import SurgeryError
from peftsurgery.formats.adapterhub.head import about, trained_head
from peftsurgery.formats.adapterhub.library import (
    FORMAT,
    LIBRARY,
    Flat,
    architectures,
    completed,
    named,
    parts,
    unflattened,
)
from peftsurgery.formats.adapterhub.reading import hub_tensors
from peftsurgery.formats.adapterhub.sites import HubSites
from peftsurgery.formats.exchange import check_implied, config_of
from peftsurgery.surgery.model.adapters import check_left_out
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.plan.cut import Cut, Operation
from peftsurgery.surgery.plan.fusion import fused_names

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Written:
    """The config and the tensors of an adapter, and those of the head that was trained with it."""

    config: dict[str, Any]
    tensors: Tensors
    head: Tensors = field(default_factory=dict)


def written_adapter(model: OperatedModel, name: str) -> Written:
    """An adapter as the library saves it. PSG512 for what it has no form for, PSG513 without names.

    Every parameter that was trained must be the adapter's or the head's.
    """
    check_left_out(model.left_out, name, "PSG512")
    build = model.source.build
    if build.vocabulary is not None:
        size = f"{build.vocabulary} tokens, where the base's files have {build.stored}"
        raise _refuse(f"the vocabulary has {size}, and the library saves none with an adapter")
    cuts = [cut for cut in model.cuts if cut.operation.name == name]
    added = [cut for cut in cuts if cut.rule.params or cut.rule.rewrite]
    sites = HubSites(model)
    operation = _only_operation(name, added)
    flat = _flat(operation, sites, added)
    values = model.learnt()
    called = ",".join(fused_names(operation)) or name
    tensors = {
        sites.full(key): joined.join(values)
        for key, joined in hub_tensors(added, sites, called).items()
    }
    config = {"config": unflattened(flat), "name": called, **about(model)}
    return Written(config, tensors, trained_head(model, sites, cuts))


def _flat(operation: Operation, sites: HubSites, cuts: Sequence[Cut]) -> Flat:
    """The config of an operation. PSG512 for settings that the library cannot have."""
    check_implied(operation, FORMAT, LIBRARY, "PSG512")
    flat = completed(config_of(operation, operation.file, FORMAT))
    for prefix, architecture in architectures(flat).items():
        part = parts()[architecture]
        adapted = dict.fromkeys(c.placed for c in cuts if c.rule.kind.name == part.kind)
        said = sites.said(part.kind, list(adapted)) if part.where else {}
        flat |= {f"{prefix}{key}": value for key, value in said.items()}
        for key, default in part.defaults.items():
            if type(default) is int and default > 0 and not flat[f"{prefix}{key}"] > 0:
                raise _unsaid(operation, f"{prefix}{key}", "a number of its own")
        for key, source in part.inherited.items():
            theirs = getattr(sites.config, source, 0.0)
            value = flat.pop(f"{prefix}{key}")
            if key not in part.taken:
                flat[f"{prefix}{key}"] = None if value == theirs else value
            elif value not in (None, theirs):
                raise _unsaid(operation, f"{prefix}{key}", f"the model's {theirs}")
    return flat


def _only_operation(name: str, cuts: Sequence[Cut]) -> Operation:
    """The operation of an adapter's cuts, all of which the library has names for. PSG512."""
    for cut in cuts:
        file = cut.operation.file
        if set(named(cut.rule)) != set(cut.rule.params) or not file.checkpoint.get(FORMAT):
            raise _refuse(f"the rule file '{file.name}' has no form in AdapterHub's library")
    operations = list(dict.fromkeys(cut.operation for cut in cuts))
    if not operations:
        raise _refuse(f"'{name}' adds no parameters, and AdapterHub has no such method")
    if len(operations) > 1:
        files = " and ".join(operation.file.name for operation in operations)
        raise _refuse(f"'{name}' is made of {files}, and AdapterHub's adapter is one method")
    return operations[0]


def _unsaid(operation: Operation, key: str, needed: str) -> SurgeryError:
    """The refusal of a setting's value that a key of the library's cannot have."""
    setting = operation.file.carried(FORMAT).get(key, key)
    value = operation.settings.get(setting)
    message = f"'{setting}' is {value!r}, and the library needs {needed} as its {key}"
    return SurgeryError("PSG512", message, f"apply the rule with another {setting}")


def _refuse(message: str) -> SurgeryError:
    return SurgeryError("PSG512", message, "save the surgery itself with save(), or fold it")
