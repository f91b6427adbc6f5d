"""extract: a LoRA adapter from two checkpoints of one model, on files.

Which tensor is the weight of which module, and how it lies in memory, the model's class tells,
built without weights; the rest is done on files (:mod:`peftsurgery.checkpoint.extracting`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from torch import nn
from transformers.pytorch_utils import Conv1D

from peftsurgery.arguments import checked
from peftsurgery.capture import open_source
from peftsurgery.capture.tensors import tensor_names
from peftsurgery.checkpoint.extracting import ExtractReport, Pair, Stored, extract_files
from peftsurgery.checkpoint.low_rank import checked_wish
from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.formats.peft.files import BASE
from peftsurgery.formats.peft.needed_base import class_said
from peftsurgery.formats.peft.target_modules import unlike
from peftsurgery.formats.peft.writing import WRAPPABLE
from peftsurgery.model_files import ModelFiles, read_model_files
from peftsurgery.outputs import fresh


@checked
def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    force: bool = False,
) -> ExtractReport:
    """Extract the LoRA adapter that turns one checkpoint into another, for peft and its readers.

    ``base`` and ``tuned`` are directories of one model's weights; they are read a few rows at a
    time. Each difference of a linear, an embedding or a plain convolution gets the largest ``rank``
    given, or the one that keeps the share ``energy`` of its squared norm, or else what stands above
    the rounding of the tuned weight's dtype. Differences of other tensors are listed in the report
    and not written.

    Raises SurgeryError: PSG317 for a rank or an energy that is none, PSG403 for what is not finite,
    PSG415 if nothing differs, PSG420 if the two are not of one model, PSG601 to PSG603 for places,
    and what :func:`capture` raises of a base that cannot be built.
    """
    wanted = checked_wish(rank, energy)
    target = Path(out)
    with fresh(target, [str(base), str(tuned)], force) as part:
        module = open_source(str(base)).module
        pairs = list(_pairs(module, read_model_files(Path(base)), read_model_files(Path(tuned))))
        return extract_files(pairs, part, target, wanted, _config(module, str(base), pairs))


def _config(module: nn.Module, base: str, pairs: list[Pair]) -> dict[str, object]:
    """Keys of the config that the model's class tells."""
    turned = any(pair.turned and pair.kind == "linear" for pair in pairs)
    return {BASE: os.path.abspath(base), **class_said(module), "fan_in_fan_out": turned}


def _pairs(module: nn.Module, before: ModelFiles, after: ModelFiles) -> Iterator[Pair]:
    """Every tensor of the model in both checkpoints. PSG420 if one has what the other lacks."""
    ties, taken = tensor_names(module), (set[str](), set[str]())
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    for name in [*dict(module.named_parameters(remove_duplicate=False))]:
        found = [_stored(files, name, ties[name], prefix) for files in (before, after)]
        if found[0] is None or found[1] is None:
            if found != [None, None]:
                raise _other(name, before if found[0] is None else after)
            continue
        one, two = found[0], found[1]
        if one[1].shape != two[1].shape:
            shapes = f"{list(one[1].shape)} and {list(two[1].shape)}"
            raise SurgeryError("PSG420", f"'{name}' has the shapes {shapes}")
        taken[0].add(one[1].name)
        taken[1].add(two[1].name)
        yield _pair(module, name, one, two)
    for names, files, others in ((taken[1], after, before), (taken[0], before, after)):
        left = sorted(files.tensors.keys() - names - others.tensors.keys())
        if left:
            raise _other(left[0], others)
        for name in sorted((files.tensors.keys() & others.tensors.keys()) - names):
            names.add(name)
            taken[0].add(name)
            yield Pair(name, before.tensors[name], after.tensors[name])


def _stored(files: ModelFiles, name: str, ties: list[str], prefix: str) -> Stored | None:
    """The tensor that a parameter is in the files, under its own name or one that it is tied to."""
    for each in (name, *ties):
        for spelled in (each, each.removeprefix(prefix), prefix + each):
            if spelled in files.tensors:
                return files.tensors[spelled]
    return None


def _other(name: str, files: ModelFiles) -> SurgeryError:
    message = f"'{files.folder}' has no '{name}', and the other checkpoint has"
    return SurgeryError("PSG420", message, did_you_mean(name, files.tensors))


def _pair(module: nn.Module, name: str, before: Stored, after: Stored) -> Pair:
    """A parameter in both checkpoints, and the module that can have a LoRA of it."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    is_plain = isinstance(owner, WRAPPABLE) and unlike(module, path) is None
    if leaf != "weight" or not is_plain or len(before[1].shape) not in (2, 4):
        return Pair(name, before, after)
    embeds, turned = isinstance(owner, nn.Embedding), isinstance(owner, Conv1D)
    kind = "embedding" if embeds else "linear"
    return Pair(name, before, after, path, kind, embeds or turned)
