"""Adapters of AdapterHub's `adapters` library, in and out.

    o = from_adapterhub(g, "adapter")    an adapter that the library saved, on a captured model
    to_adapterhub(o, "adapter")          one that ``model.load_adapter("adapter",
                                         use_safetensors=True)`` loads

The library runs with transformers 4 and not beside 5, so the two meet in files alone. What cannot
be honoured, one way or the other, is refused by name; nothing is skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..capture import GraphModel
from ..errors import SurgeryError, did_you_mean
from ..language import Rule, RuleFile, Where
from ..surgery import OperatedModel, Operation, adapter_name, check_covered, operate
from .adapterhub_config import HubConfig
from .adapterhub_export import about, export
from .adapterhub_files import (
    adapter_contents,
    head_contents,
    read_config,
    read_head,
    read_tensors,
    write_adapter,
)
from .adapterhub_import import Importer, Plan


def from_adapterhub(
    model: GraphModel, directory: str | Path, name: str | None = None
) -> OperatedModel:
    """``model`` with the adapter in ``directory``, under ``name`` or the name it was saved with.

    A head that was saved with it comes along as parameters of the model that were trained. Raises
    PSG501 to PSG507 for an adapter that is damaged, asks for what is not honoured, or was made for
    another base, and PSG513 for a model of a type that the library has no names for.
    """
    if not isinstance(model, GraphModel):
        message = f"an adapter is put on a captured model, not on a {type(model).__name__}"
        raise SurgeryError("PSG309", message, "capture it first: from_adapterhub(capture(model))")
    folder = Path(directory)
    config = HubConfig(read_config(folder))
    importer = Importer(model, config, adapter_name(name or config.name))
    tensors = {importer.places.plain(key): value for key, value in read_tensors(folder).items()}
    plan = importer.plan(tensors)
    add_head(plan, model, read_head(folder), importer.name)
    before = set(model.learnt()) if isinstance(model, OperatedModel) else set[str]()
    operated = operate(model, plan.operations, plan.known)
    check_covered(str(folder), operated.learnt().keys() - before, plan.known.keys() - before)
    return operated


def to_adapterhub(model: OperatedModel, directory: str | Path, name: str | None = None) -> None:
    """Write the adapter ``name`` (or the only one) as the library does, tensors as safetensors.

    Raises PSG512 for what the library has no form for, PSG513 if it has no names for the model's
    places, PSG511 if it is not clear which adapter is meant, PSG601 and PSG603 if the directory
    cannot be written.
    """
    operations = model.operations if isinstance(model, OperatedModel) else ()
    names = list(dict.fromkeys(operation.name for operation in operations))
    if not names:
        raise SurgeryError("PSG511", "the model has no adapters", "apply rules to it first")
    if name is None and len(names) > 1:
        message = f"the model has {len(names)} adapters, and a directory of AdapterHub's holds one"
        raise SurgeryError("PSG511", message, f"choose by name: {', '.join(names)}")
    chosen = names[0] if name is None else name
    if chosen not in names:
        raise SurgeryError("PSG511", f"there is no adapter '{name}'", did_you_mean(chosen, names))
    with model.only(chosen):
        written = export(model, chosen)
    contents = adapter_contents(written.config, written.tensors)
    if written.head:
        contents |= head_contents(_head_config(model), written.head)
    write_adapter(Path(directory), contents)


def add_head(plan: Plan, model: GraphModel, tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Add a head's parameters to a plan, as the model's own that were trained. PSG514 if not."""
    parameters = dict(model.source.module.named_parameters(remove_duplicate=False))
    for key, value in tensors.items():
        if key not in parameters:
            message = f"the head's tensor '{key}' has no place in the model"
            hint = "it belongs to a head of the library's own; load the adapter without its head"
            raise SurgeryError("PSG514", message, hint)
        if value.shape != parameters[key].shape:
            shapes = f"{list(value.shape)}, where {list(parameters[key].shape)} is needed"
            raise SurgeryError("PSG514", f"the head's tensor '{key}' has shape {shapes}")
    if tensors:
        rule = Rule(match="parameter", where=Where(paths=tuple(tensors)), train=True)
        about = "A head that came with an AdapterHub adapter."
        plan.operations.append(
            Operation(RuleFile(name="head", about=about, rules=(rule,)), {}, name)
        )
        plan.known.update(tensors)


def _head_config(model: OperatedModel) -> dict[str, Any]:
    """What the library writes beside a head that is the model class's own."""
    module: Any = model.source.module
    labels = getattr(module.config, "label2id", None)
    more = {"label2id": labels, "num_labels": len(labels)} if labels else {}
    return {"config": None, "name": None, **about(model), **more}
