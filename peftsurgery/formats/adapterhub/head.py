"""Heads that AdapterHub's library saves with an adapter: the model class's own, trained with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from peftsurgery.capture import GraphModel
from peftsurgery.errors import SurgeryError
from peftsurgery.formats.adapterhub.library import version
from peftsurgery.formats.adapterhub.sites import HubSites
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.plan.cut import Cut

Tensors = Mapping[str, torch.Tensor]


def check_head(model: GraphModel, tensors: Tensors) -> None:
    """Refuse a head whose tensors are no parameters of the model. PSG514."""
    parameters = dict(model.source.module.named_parameters(remove_duplicate=False))
    for key, value in tensors.items():
        if key not in parameters:
            message = f"the head's tensor '{key}' has no place in the model"
            raise SurgeryError("PSG514", message, "leave it out: from_adapterhub(..., head=False)")
        if value.shape != parameters[key].shape:
            shapes = f"{list(value.shape)}, where {list(parameters[key].shape)} is needed"
            raise SurgeryError("PSG514", f"the head's tensor '{key}' has shape {shapes}")


def trained_head(
    model: OperatedModel, sites: HubSites, cuts: Iterable[Cut]
) -> dict[str, torch.Tensor]:
    """The head's parameters, if cuts train any; PSG512 for other parameters of the model."""
    names = {str(cut.placed.parameter) for cut in cuts if cut.rule.train}
    for name in sorted(names):
        if not sites.headed or name.startswith(sites.prefix):
            message = f"'{name}' was trained, and AdapterHub keeps only the head's parameters"
            raise SurgeryError("PSG512", message, "save the surgery itself with save(), or fold it")
    base = dict(model.source.module.named_parameters(remove_duplicate=False))
    heads = [n for n in base if not n.startswith(sites.prefix)] if names else []
    return {n: model.dense(n).cpu() for n in heads}


def about(model: GraphModel) -> dict[str, Any]:
    """What the library's configs say of the model and the library."""
    module: Any = model.source.module
    return {
        "model_type": module.config.model_type,
        "model_class": type(module).__name__,
        "model_name": model.source.origin or "",
        "hidden_size": module.config.hidden_size,
        "version": version(),
    }


def head_config(model: GraphModel) -> dict[str, Any]:
    """What the library writes beside a head that is the model class's own."""
    module: Any = model.source.module
    labels = getattr(module.config, "label2id", None)
    more = {"label2id": labels, "num_labels": len(labels)} if labels else {}
    return {"config": None, "name": None, **about(model), **more}
