"""Adapters of AdapterHub's `adapters` library, in and out.

    o = from_adapterhub(g, "adapter")    an adapter that the library saved, on a captured model
    to_adapterhub(o, "adapter")          one that ``model.load_adapter("adapter",
                                         use_safetensors=True)`` loads

A fusion goes in and out with its adapters, as ``save_adapter_setup`` writes it. The library runs
with transformers 4 and not beside 5, so the two meet in files alone. What cannot be honoured, one
way or the other, is refused by name; nothing is skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from peftsurgery.arguments import checked_but
from peftsurgery.capture import GraphModel
from peftsurgery.formats.adapterhub.config import HubConfig
from peftsurgery.formats.adapterhub.files import (
    ADAPTER,
    FUSION,
    HEAD,
    SETUP,
    module_files,
    read_head,
    read_hub_config,
    read_hub_tensors,
)
from peftsurgery.formats.adapterhub.fusion_setup import (
    as_fusion,
    fusion_config,
    is_setup,
    read_setup,
    setup_content,
)
from peftsurgery.formats.adapterhub.head import check_head, head_config
from peftsurgery.formats.adapterhub.library import LIBRARY
from peftsurgery.formats.adapterhub.reading import hub_plan
from peftsurgery.formats.adapterhub.sites import HubSites
from peftsurgery.formats.adapterhub.writing import Written, written_adapter
from peftsurgery.formats.exchange import (
    AdapterPlan,
    check_captured,
    chosen_adapter,
    installed,
    training,
    write_exported,
)
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.plan.cut import adapter_name
from peftsurgery.surgery.plan.fusion import fused_names

FUSED_NAME = "fusion"


@checked_but("model")
def from_adapterhub(
    model: GraphModel,
    directory: str | Path,
    name: str | None = None,
    head: bool = True,
    allow_other_base: bool = False,
) -> OperatedModel:
    """Read an adapter of AdapterHub's library from ``directory`` onto a model; returns a new model.

    A fusion is called `fusion` unless ``name`` is given, and its adapters keep their names. A head
    that was saved along comes as parameters of the model that were trained, unless ``head`` is
    False. Raises PSG501 to PSG507 for an adapter that is damaged, asks for what is not honoured, or
    was made for another base, PSG513 for a model of a type that the library has no names for,
    PSG514 for a head that has no place in the model, PSG319 for a base that something was folded
    into, unless the adapter names it or ``allow_other_base`` is given.
    """
    check_captured(model, "from_adapterhub")
    folder, sites = Path(directory), HubSites(model)
    if is_setup(folder):
        plan = _fusion(model, sites, folder, adapter_name(name or FUSED_NAME), head)
    else:
        plan = _adapter(model, sites, folder, name, head)
    inner = folder / read_setup(folder)[-1] if is_setup(folder) else folder
    base = read_hub_config(inner).get("model_name")
    return installed(model, folder, plan, base, plan.known, allow_other_base)


@checked_but("model")
def to_adapterhub(model: OperatedModel, directory: str | Path, name: str | None = None) -> None:
    """Write the adapter ``name`` (or the only one) as the library does, tensors as safetensors.

    A fusion is written with its adapters, and is the one that is meant if it is over all others.
    Raises PSG512 for what the library has no form for, PSG513 if it has no names for the model's
    places, PSG511 if it is not clear which adapter is meant, PSG601 and PSG603 if the directory
    cannot be written.
    """
    chosen = chosen_adapter(model, name, LIBRARY)
    mine = [operation for operation in model.operations if operation.name == chosen]
    fused = [name for operation in mine for name in fused_names(operation)]
    written = _written(model, chosen)
    if fused:
        files = {SETUP: setup_content(fused)}
        for adapter in fused:
            files |= _contents(model, _written(model, adapter), adapter)
        config = as_fusion(written.config)
        files |= module_files(FUSION, config, written.tensors, ",".join(fused))
    else:
        files = _contents(model, written)
    others = (HEAD.config, HEAD.tensors, HEAD.pickled, ADAPTER.pickled, FUSION.pickled)
    stale = {Path(file).with_name(other).as_posix() for file in files for other in others}
    marker = SETUP if fused else ADAPTER.config
    write_exported(model, chosen, Path(directory), files, marker, stale)


def _adapter(
    model: GraphModel, sites: HubSites, folder: Path, name: str | None, with_head: bool
) -> AdapterPlan:
    """What one adapter's directory is on a model."""
    config = HubConfig(read_hub_config(folder), sites.config)
    name = adapter_name(name or config.name)
    plan = hub_plan(model, sites, config, name, _plain(sites, read_hub_tensors(folder)))
    head = read_head(folder) if with_head else {}
    check_head(model, head)
    if head:
        about = "A head that came with an AdapterHub adapter."
        plan.add(AdapterPlan([training(head, "head", about, name)], [], head))
    return plan


def _fusion(
    model: GraphModel, sites: HubSites, folder: Path, name: str, with_head: bool
) -> AdapterPlan:
    """What a setup's directory is: the adapters, and the fusion over them."""
    names = read_setup(folder)
    plan = AdapterPlan()
    for adapter in names:
        plan.add(_adapter(model, sites, folder / adapter, adapter, with_head))
    last = read_hub_config(folder / names[-1]).get("config")
    config = HubConfig(fusion_config(folder, names, dict(last or {})), sites.config)
    tensors = _plain(sites, read_hub_tensors(folder / ",".join(names), FUSION))
    plan.add(hub_plan(model, sites, config, name, tensors, plan.cuts))
    return plan


def _plain(sites: HubSites, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {sites.plain(key): value for key, value in tensors.items()}


def _written(model: OperatedModel, name: str) -> Written:
    """An adapter as files, by what it holds when it is the one that is active."""
    with model.only(name):
        return written_adapter(model, name)


def _contents(model: OperatedModel, written: Written, folder: str = "") -> dict[str, bytes]:
    files = module_files(ADAPTER, written.config, written.tensors, folder)
    if written.head:
        files |= module_files(HEAD, head_config(model), written.head, folder)
    return files
