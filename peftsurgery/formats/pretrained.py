"""Hugging Face directories: what ``fold`` writes, so that plain transformers loads it.

A directory holds the folded weights and config, as ``save_pretrained`` writes them, and the files
of the base that belong to the model all the same: tokenizer, vocabulary, processors, the parts of a
sentence-transformers pipeline. A plain module gives ``model.safetensors``, its state dict.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import PreTrainedModel

from peftsurgery.arguments import checked
from peftsurgery.capture import GraphModel
from peftsurgery.capture.tensors import tensor_names
from peftsurgery.checkpoint.fold_report import FoldReport
from peftsurgery.errors import SurgeryError, first_line
from peftsurgery.files import absence, write_whole
from peftsurgery.formats.base_files import companions, copy_missing
from peftsurgery.formats.foreign.names import import_hint
from peftsurgery.formats.model_card import write_record
from peftsurgery.formats.onnx.export import write_onnx
from peftsurgery.formats.onnx.runtime import need_onnx
from peftsurgery.formats.peft.adapter import read_adapter
from peftsurgery.formats.peft.directory import from_peft
from peftsurgery.formats.peft.files import BASE, CONFIG, read_peft_config
from peftsurgery.formats.peft.needed_base import open_peft_base
from peftsurgery.formats.trial_inputs import (
    largest_gap,
    output_tensors,
    tolerance_of,
    unseen_inputs,
)
from peftsurgery.model_files import refuse_program
from peftsurgery.places import give_usual_mode
from peftsurgery.quiet import quiet
from peftsurgery.surgery.fold.folding import fold_with_error
from peftsurgery.surgery.fold.vocabulary import missing_values
from peftsurgery.surgery.fourbit.requantise import pack_layers
from peftsurgery.surgery.loading import load_on
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.model.saved.manifest import is_surgery
from peftsurgery.surgery.model.writable import check_places
from peftsurgery.surgery.plan.cut import notes_of
from peftsurgery.tokenizer_files import tokenizer_files

WEIGHTS = "model.safetensors"


@checked
def fold_to_directory(
    spec: str | Path,
    out: str | Path,
    base: GraphModel | str | None = None,
    onnx: str | Path | None = None,
    verify: bool = False,
    adapters: Collection[str] = (),
    requantise: bool = False,
    allow_other_base: bool = False,
    kind: str | None = None,
) -> FoldReport:
    """Fold a saved surgery or a peft adapter into its base, and write a plain model to ``out``.

    ``out`` must not exist; if anything fails, it does not afterwards. ``base`` is the base model if
    it is not where the adapter says; ``onnx`` is where to write the model as ONNX too; ``verify``
    compares the outputs of what is read back with the operated model's at two shapes; ``adapters``
    are folded instead of those that were active when the surgery was saved; ``requantise`` packs
    again what is kept in four bits, and ``verify`` then compares with what was packed;
    ``allow_other_base`` takes a base that the adapter was not made for, ``kind`` names the class
    that it is read as, if not the one that the adapter or its config says. What was folded into
    what is in ``peftsurgery.json``. Raises what :func:`fold` raises, PSG310 for an unknown adapter,
    PSG319 for another base, PSG602 if ``out`` or ``onnx`` would lie in what is read, PSG607 if
    ``spec`` is no such directory, PSG410 if the result is not the operated model or, verified or
    not, lacks weights to load, and PSG411 and PSG412 if its ONNX is not.
    """
    folder, file = Path(out), [] if onnx is None else [Path(onnx)]
    if file:
        need_onnx()
    with quiet():
        operated = open_adapter(Path(spec), base, allow_other_base, kind)
        if adapters:
            operated.choose(*adapters)
        check_places(operated, folder, *file)
        plain, error = fold_with_error(operated, requantise)
    plain.eval()
    report = _changes(operated, plain, folder)
    if requantise:
        pack_layers(plain, operated.stored)
    with ExitStack() as unfinished:
        unfinished.callback(shutil.rmtree, _make(folder), ignore_errors=True)
        write_record(folder, operated)
        copied, notes = write_model(plain, folder, operated.source.origin, Path(spec))
        apart = _check(operated, plain, folder, verify, requantise)
        written = [write_onnx(operated, plain, path) for path in file]
        unfinished.pop_all()
    told, made = (*report.notes, *notes), next(iter(written), None)
    report = replace(report, copied=copied, verified=apart, notes=told, onnx=made)
    return replace(report, error=error.to_dict())


def _changes(operated: OperatedModel, plain: nn.Module, folder: Path) -> FoldReport:
    """What is to be said of a fold before it is written."""
    source = operated.source
    before, told = source.weights(), (*source.build.notes, *source.notes)
    return FoldReport(
        folder,
        dict(weight_changes(before, plain)),
        len(plain.state_dict()),
        notes=(*told, *notes_of(operated.operations)),
        adapters=operated.active,
        untied=tensor_names(plain) != tensor_names(before),
    )


def _make(folder: Path) -> Path:
    """The directory, made; PSG601 if it is there already."""
    try:
        folder.mkdir()
    except FileExistsError:
        raise SurgeryError("PSG601", f"'{folder}' exists already", "choose another name") from None
    return folder


def _check(
    operated: OperatedModel, plain: nn.Module, folder: Path, verify: bool, requantise: bool
) -> float | None:
    """Largest verified output difference; None if only weight names were checked."""
    if verify:
        wanted = plain if requantise else operated
        return check_written(wanted, plain, folder, unseen_inputs(operated))
    if isinstance(plain, PreTrainedModel) and not requantise:  # four bits may need another machine
        _read_back(plain, folder)  # memory-mapped: the weights themselves are not read
    return None


def open_adapter(
    path: Path,
    base: GraphModel | str | None = None,
    allow_other_base: bool = False,
    kind: str | None = None,
) -> OperatedModel:
    """The operated model of a saved surgery or of a peft adapter's directory.

    PSG607 for others, PSG218 for a class that a captured base is not of, PSG319 for a base that it
    was not made for, unless that is allowed. PSG515 if the base was read as another class, and
    parameters of that have no values anywhere.
    """
    _check_class(base, kind)
    operated = _opened(path, base, allow_other_base, kind)
    lost = list(missing_values(operated))
    if lost:
        kind = type(operated.source.module).__name__
        message = f"'{lost[0]}' of a {kind} is neither in the base nor in '{path}'"
        raise SurgeryError("PSG515", message, "name another class with --class, or another base")
    return operated


def _check_class(base: GraphModel | str | None, kind: str | None) -> None:
    """Refuse another class for a base that is there already, in its own. PSG218."""
    if kind is None or not isinstance(base, GraphModel):
        return
    own = type(base.source.module).__name__
    if kind != own:
        message = f"the base that is given is a {own}, and cannot be read as a '{kind}'"
        raise SurgeryError("PSG218", message, "name the directory of the base, or capture that")


def _opened(
    path: Path, base: GraphModel | str | None, allow_other_base: bool, kind: str | None
) -> OperatedModel:
    if is_surgery(path):
        return load_on(path, base, allow_other_base, kind)
    refuse_program(path)
    if not (path / CONFIG).is_file():
        what = f"'{path}' holds neither a surgery nor a peft adapter"
        message = what if path.is_dir() else absence(path, CONFIG)
        hint = import_hint(path) or "make one with `peftsurgery apply`"
        raise SurgeryError("PSG607", message, hint)
    named = base or read_peft_config(path).get(BASE)
    if not named:
        raise SurgeryError("PSG311", f"'{path}' does not say what it was made for", "give --base")
    if isinstance(named, str):
        named = open_peft_base(named, read_adapter(path), kind, allow_other_base)
    return from_peft(named, path, allow_other_base=allow_other_base)


def weight_changes(before: nn.Module, after: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """The weights that differ: how far an element moved at most, and how far the whole.

    ``relative`` is the change's norm in parts of the weight's. Most weights that a fold left alone
    share their memory with the base.
    """
    for name, new in after.named_parameters():
        old = before.get_parameter(name)
        if new.data_ptr() == old.data_ptr() or torch.equal(new, old):
            continue
        wide = torch.promote_types(old.dtype, torch.float32)
        gap = (new.detach().to(wide) - old.detach().to(wide)).abs()
        norm = float(old.detach().to(wide).norm())
        relative = float(gap.norm()) / norm if norm else 0.0
        dtype = str(new.dtype).removeprefix("torch.")
        sizes = {"shape": list(new.shape), "dtype": dtype}
        yield name, {**sizes, "largest": float(gap.max()), "relative": relative}


def write_model(
    plain: nn.Module, folder: Path, origin: str | None, adapter: Path | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write a plain model to an empty directory, with the other files of its base.

    The tokenizer is that of ``adapter``, a directory, if it has one. Returns the files that were
    taken over from the base, and notes for the reader.
    """
    try:
        with quiet():
            if isinstance(plain, PreTrainedModel):
                plain.save_pretrained(folder)
            else:
                save_model(plain, str(folder / WEIGHTS))
    except SafetensorError as error:  # a full disk, for one, is not an OSError here
        raise SurgeryError("PSG603", f"{folder}: {error}") from None
    for file in folder.glob("*.safetensors"):
        give_usual_mode(file)
    if not isinstance(plain, PreTrainedModel):
        return (), ()
    own = {} if adapter is None else tokenizer_files(adapter)
    write_whole(folder, own)
    notes = (f"the tokenizer is the one in '{adapter}'",) if own else ()
    if origin is None:
        return (), notes
    found = companions(origin)
    if found is None:
        lost = f"the tokenizer of '{origin}' was not found here and is not in the result"
        return (), notes or (lost,)
    return tuple(copy_missing(found, folder, bool(own))), notes


def check_written(
    wanted: nn.Module, plain: nn.Module, folder: Path, cases: Iterable[Mapping[str, Any]]
) -> float:
    """Read a written model back and compare it with the wanted one; the largest difference.

    Raises PSG410 if weights are missing, or outputs differ by more than :func:`tolerance_of`.
    """
    again = _read_back(plain, folder).eval()
    was_training = wanted.training
    wanted.eval()
    with torch.no_grad():
        made = ((each, _outputs(wanted, each), _outputs(again, each)) for each in cases)
        largest = largest_gap(made, tolerance_of(plain)[1], "PSG410", "the reloaded model's")
    wanted.train(was_training)
    return largest


def _outputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What a model returns; PSG410 where its layers do not run on this machine."""
    try:
        return output_tensors(model(**inputs))
    except RuntimeError as error:
        raise SurgeryError("PSG410", f"what was written does not run here: {error}") from error


def _read_back(plain: nn.Module, folder: Path) -> nn.Module:
    """The model that was written, as its library loads it; PSG410 if it lacks weights."""
    try:
        with quiet():
            if not isinstance(plain, PreTrainedModel):
                again = copy.deepcopy(plain)
                load_model(again, folder / WEIGHTS)
                return again
            model, info = type(plain).from_pretrained(
                folder, dtype=plain.dtype, output_loading_info=True
            )
    except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        reason = first_line(error)
        raise SurgeryError("PSG410", f"what was written cannot be read back: {reason}") from error
    lost = sorted(info["missing_keys"])
    if lost:
        raise SurgeryError("PSG410", f"{len(lost)} weights were not written, '{lost[0]}' first")
    return model
