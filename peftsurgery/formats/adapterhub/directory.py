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
from dataclasses import replace
from pathlib import Path

import torch

from peftsurgery.arguments import checked_but
from peftsurgery.capture import GraphModel
from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.files import remove
from peftsurgery.formats.adapter_files import write_adapter_files
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
from peftsurgery.formats.adapterhub.head import check_head, head_config, train_head
from peftsurgery.formats.adapterhub.reading import Importer, Plan
from peftsurgery.formats.adapterhub.writing import Written, written_adapter
from peftsurgery.surgery.applying import check_taken, operate
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.model.provenance import check_places, clear_export_record, export_record
from peftsurgery.surgery.model.same_base import check_adapter_base
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
    if not isinstance(model, GraphModel):
        message = f"an adapter is put on a captured model, not on a {type(model).__name__}"
        raise SurgeryError("PSG309", message, "capture it first: from_adapterhub(capture(model))")
    folder = Path(directory)
    importer = Importer(model, head)
    if is_setup(folder):
        plan = _fusion(importer, folder, adapter_name(name or FUSED_NAME))
    else:
        plan = _adapter(importer, folder, name)
    inner = folder / read_setup(folder)[-1] if is_setup(folder) else folder
    base = read_hub_config(inner).get("model_name")
    origin = check_adapter_base(folder, base, plan.known, model.source, allow_other_base)
    operated = operate(model, [replace(op, origin=origin) for op in plan.operations], plan.known)
    check_taken(str(folder), operated, model, plan.operations, plan.known)
    return operated


@checked_but("model")
def to_adapterhub(model: OperatedModel, directory: str | Path, name: str | None = None) -> None:
    """Write the adapter ``name`` (or the only one) as the library does, tensors as safetensors.

    A fusion is written with its adapters, and is the one that is meant if it is over all others.
    Raises PSG512 for what the library has no form for, PSG513 if it has no names for the model's
    places, PSG511 if it is not clear which adapter is meant, PSG601 and PSG603 if the directory
    cannot be written.
    """
    chosen = _choose(model, name)
    fused = [n for op in model.operations if op.name == chosen for n in fused_names(op)]
    if not fused:
        files = _contents(model, _written(model, chosen)) | export_record(model, chosen)
        _write(model, Path(directory), files, ADAPTER.config)
        return
    files = {SETUP: setup_content(fused)} | export_record(model, chosen)
    for adapter in fused:
        files |= _contents(model, _written(model, adapter), adapter)
    fusion = _written(model, chosen)
    files |= module_files(FUSION, as_fusion(fusion.config), fusion.tensors, ",".join(fused))
    _write(model, Path(directory), files, SETUP)


def _write(model: GraphModel, folder: Path, files: Mapping[str, bytes], marker: str) -> None:
    """Write the files; what the library would read besides or instead goes.

    PSG601, PSG602, PSG603.
    """
    others = (HEAD.config, HEAD.tensors, HEAD.pickled, ADAPTER.pickled, FUSION.pickled)
    extras = {Path(file).with_name(other) for file in files for other in others}
    check_places(model, *(folder / file for file in files), *(folder / path for path in extras))
    write_adapter_files(folder, files, marker)
    remove(folder / path for path in extras if path.as_posix() not in files)
    clear_export_record(folder, files)


def _adapter(importer: Importer, folder: Path, name: str | None) -> Plan:
    """What one adapter's directory is on the importer's model."""
    config = HubConfig(read_hub_config(folder), importer.model_config)
    name = adapter_name(name or config.name)
    plan = importer.plan(config, name, _plain(importer, read_hub_tensors(folder)))
    head = read_head(folder) if importer.with_head else {}
    check_head(importer.model, head)
    if head:
        plan.operations.append(train_head(head, name))
        plan.known.update(head)
    return plan


def _fusion(importer: Importer, folder: Path, name: str) -> Plan:
    """What a setup's directory is: the adapters, and the fusion over them."""
    names = read_setup(folder)
    plan = Plan()
    for adapter in names:
        plan.add(_adapter(importer, folder / adapter, adapter))
    last = read_hub_config(folder / names[-1]).get("config")
    values = fusion_config(folder, names, dict(last or {}))
    config = HubConfig(values, importer.model_config)
    tensors = _plain(importer, read_hub_tensors(folder / ",".join(names), FUSION))
    plan.add(importer.plan(config, name, tensors, plan.cuts))
    return plan


def _plain(importer: Importer, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {importer.sites.plain(key): value for key, value in tensors.items()}


def _choose(model: OperatedModel, name: str | None) -> str:
    """The adapter that is meant. PSG511."""
    operations = model.operations if isinstance(model, OperatedModel) else ()
    names = list(dict.fromkeys(operation.name for operation in operations))
    if not names:
        raise SurgeryError("PSG511", "the model has no adapters", "apply rules to it first")
    fused = {inner for operation in operations for inner in fused_names(operation)}
    outer = [known for known in names if known not in fused]
    if name is None and len(outer) > 1:
        message = f"the model has {len(outer)} adapters, and a directory of AdapterHub's holds one"
        raise SurgeryError("PSG511", message, f"choose by name: {', '.join(names)}")
    if name is not None and name not in names:
        raise SurgeryError("PSG511", f"there is no adapter '{name}'", did_you_mean(name, names))
    return outer[0] if name is None else name


def _written(model: OperatedModel, name: str) -> Written:
    """An adapter as files, by what it holds when it is the one that is active."""
    with model.only(name):
        return written_adapter(model, name)


def _contents(model: OperatedModel, written: Written, folder: str = "") -> dict[str, bytes]:
    files = module_files(ADAPTER, written.config, written.tensors, folder)
    return files | (
        module_files(HEAD, head_config(model), written.head, folder) if written.head else {}
    )
