"""Exchange of adapters with other libraries: what reading and writing have in common.

A library is a table of its words (``library.yaml``), what the rule files say of it under
``checkpoint``, and a translation of its config and of its tensors' names. The rest is here: which
operations an adapter is, what its config implies and carries, how it is put on a model, and which
of a model's adapters is written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from peftsurgery.anatomy import Placed
from peftsurgery.capture import GraphModel
from peftsurgery.capture.sharded import check_whole
from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.files import remove, write_files
from peftsurgery.language.evaluation import evaluate
from peftsurgery.language.expression import Expression
from peftsurgery.language.rule_file import RuleFile
from peftsurgery.language.schema import Rule
from peftsurgery.language.settings import resolve_settings
from peftsurgery.language.where import Where
from peftsurgery.surgery.applying import check_taken, operate
from peftsurgery.surgery.model.fold_record import clear_export_record, export_record
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.model.same_base import check_adapter_base
from peftsurgery.surgery.model.writable import check_places
from peftsurgery.surgery.plan.cut import Cut, Operation
from peftsurgery.surgery.plan.fusion import fused_names
from peftsurgery.surgery.plan.select import select_cuts


@dataclass(frozen=True)
class AdapterPlan:
    """Operations that an adapter file amounts to, their cuts, and parameter values by name."""

    operations: list[Operation] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    known: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, other: AdapterPlan) -> None:
        """Take over what another plan holds, after what is there. PSG514 if two heads differ."""
        for name in other.known.keys() & self.known.keys():
            if not torch.equal(self.known[name], other.known[name]):
                raise SurgeryError("PSG514", f"two adapters come with a '{name}' of their own")
        self.operations.extend(other.operations)
        self.cuts.extend(other.cuts)
        self.known.update(other.known)


def check_captured(model: object, function: str) -> None:
    """Refuse to put an adapter on anything but a captured model. PSG309."""
    if not isinstance(model, GraphModel):
        message = f"an adapter is put on a captured model, not on a {type(model).__name__}"
        raise SurgeryError("PSG309", message, f"capture it first: {function}(capture(model), ...)")


def installed(
    model: GraphModel,
    folder: Path,
    plan: AdapterPlan,
    base: Any,
    tensors: Mapping[str, torch.Tensor],
    allow_other_base: bool,
    notes: Iterable[str] = (),
) -> OperatedModel:
    """Put a planned adapter on a model; returns a new model.

    ``base`` is what the adapter says of its base, ``tensors`` are its own, which tell whether it
    was folded into this one; ``notes`` are for the report. Raises PSG319 for another base.
    """
    origin = check_adapter_base(folder, base, tensors, model.source, allow_other_base)
    origin = replace(origin, notes=(*origin.notes, *notes))
    operations = [replace(operation, origin=origin) for operation in plan.operations]
    operated = operate(model, operations, plan.known)
    check_taken(str(folder), operated, model, plan.operations, plan.known)
    return operated


def chosen_adapter(model: object, name: str | None, library: str) -> str:
    """Choose the adapter to write: ``name``, or the only one.

    Raises PSG511 if unclear, PSG225 if other processes hold parts of the model.
    """
    if not isinstance(model, OperatedModel) or not model.operations:
        raise SurgeryError("PSG511", "the model has no adapters", "apply rules to it first")
    check_whole(model)
    operations = model.operations
    names = list(dict.fromkeys(operation.name for operation in operations))
    fused = {inner for operation in operations for inner in fused_names(operation)}
    outer = [known for known in names if known not in fused]
    if name is None and len(outer) > 1:
        message = f"the model has {len(outer)} adapters, and a directory of {library}'s holds one"
        raise SurgeryError("PSG511", message, f"choose by name: {', '.join(names)}")
    if name is not None and name not in names:
        raise SurgeryError("PSG511", f"there is no adapter '{name}'", did_you_mean(name, names))
    return outer[0] if name is None else name


def write_exported(
    model: OperatedModel,
    name: str,
    folder: Path,
    contents: Mapping[str, bytes],
    marker: str,
    stale: Collection[str] = (),
) -> None:
    """Write the files of an adapter, with a record if it is on another base than it was made for.

    ``stale`` are files that the library would read besides or instead: they go. PSG601 if the place
    holds anything but such files (``marker`` is one of them), PSG602, PSG603.
    """
    mine = [operation for operation in model.operations if operation.name == name]
    written = {**contents, **export_record(model.source, mine)}
    check_places(model, *(folder / file for file in (*written, *stale)))
    write_files(folder, written, marker, "PSG601", "an adapter's directory")
    remove(folder / file for file in stale if file not in written)
    clear_export_record(folder, written)


def is_paired(model: GraphModel) -> bool:
    """Whether a model is an encoder and a decoder."""
    config = getattr(model.source.module, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))


def meant_operation(
    model: GraphModel,
    file: RuleFile,
    carried: Mapping[str, Any],
    name: str,
    format_name: str,
    before: Iterable[Cut] = (),
) -> tuple[Operation, list[Cut]]:
    """Build the operation of a format's adapter on a model, with its cuts that have parameters.

    ``carried`` are the settings that its config carries; others are implied, see
    :meth:`RuleFile.implied`. ``before`` are the cuts of adapters that it may be over.
    """
    known: dict[str, Any] = {"paired": is_paired(model)}
    while True:
        settings = {**carried, **_implied(file, format_name, known)}
        operation = Operation(file, resolve_settings(file, settings), name)
        cuts = select_cuts(model.base_capture, operation, before)[0]
        cuts = [cut for cut in cuts if cut.rule.params]
        if "sites" in known:
            return operation, cuts
        known["sites"] = len(cuts)


def _implied(file: RuleFile, format_name: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Implied settings that can be evaluated from what is known of the model."""
    values = file.implied(format_name).items()
    return {
        name: evaluate(value, known) if isinstance(value, Expression) else value
        for name, value in values
        if not isinstance(value, Expression) or set(value.names) <= known.keys()
    }


def check_implied(operation: Operation, format_name: str, library: str, code: str) -> None:
    """Refuse settings other than those that every adapter of a format has."""
    for setting, implied in operation.file.implied(format_name).items():
        value = operation.settings[setting]
        if not isinstance(implied, Expression) and value != implied:
            raise not_known(operation, setting, implied, library, code)


def not_known(
    operation: Operation, setting: str, usual: Any, library: str, code: str
) -> SurgeryError:
    """Error for a setting that a library has only at its usual value."""
    value = operation.settings[setting]
    message = f"'{operation.name}' has {setting} = {value!r}, and {library} knows only {usual!r}"
    return SurgeryError(code, message, "save the surgery itself with save(), or fold it")


def config_of(operation: Operation, form: RuleFile, format_name: str) -> dict[str, Any]:
    """Config of an operation: keys that identify the method, and those that carry settings."""
    carried = form.carried(format_name).items()
    return form.identifying(format_name) | {key: operation.settings[name] for key, name in carried}


def training(parameters: Iterable[str], method: str, about: str, name: str) -> Operation:
    """Make the operation that trains parameters of the model, for the adapter ``name``."""
    rule = Rule(match="parameter", where=Where(paths=tuple(parameters)), train=True)
    return Operation(RuleFile(name=method, about=about, rules=(rule,)), {}, name)


def exactly(sites: Sequence[Placed]) -> Where:
    """Clauses that choose exactly these sites, by module paths, and roles for parts of weights."""
    choices: list[dict[str, Any]] = []
    whole = [site.module for site in sites if site.slice is None]
    parts = [site for site in sites if site.slice is not None]
    if whole:
        choices.append({"paths": list(dict.fromkeys(whole))})
    if parts:
        paths = list(dict.fromkeys(site.module for site in parts))
        choices.append({"paths": paths, "role": sorted({str(site.role) for site in parts})})
    return Where.model_validate(choices[0] if len(choices) == 1 else {"any": choices})
