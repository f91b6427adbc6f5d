"""import_adapter: the LoRA that another program wrote, as a directory of peft's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from peftsurgery.arguments import checked
from peftsurgery.capture import open_source
from peftsurgery.checkpoint.lora_folder import write_layers
from peftsurgery.errors import SurgeryError
from peftsurgery.formats.foreign.adapting import adapted
from peftsurgery.formats.foreign.names import ForeignNames, ForeignPart, foreign_file
from peftsurgery.formats.foreign.reading import ForeignValues
from peftsurgery.formats.foreign.target import ForeignTarget
from peftsurgery.formats.peft.files import BASE
from peftsurgery.formats.peft.needed_base import class_said
from peftsurgery.formats.peft.target_modules import unlike
from peftsurgery.formats.peft.writing import WRAPPABLE
from peftsurgery.outputs import fresh
from peftsurgery.tensor_file import read_header


@dataclass(frozen=True)
class ImportReport:
    """What was imported: the rank at each module, and how many tensors are for other models."""

    out: Path
    ranks: Mapping[str, int]
    others: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """The report as ``--json`` prints it."""
        return {**asdict(self), "out": str(self.out)}

    def __str__(self) -> str:
        sizes = sorted(set(self.ranks.values()))
        said = " to ".join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1])))
        lines = [f"{len(self.ranks)} layers of rank {said}, in '{self.out}'"]
        for part, count in self.others.items():
            lines.append(f"note: {count} tensors are for another model, {part or 'without a name'}")
        return "\n".join(lines)


@checked
def import_adapter(
    source: str | Path,
    out: str | Path,
    base: str | Path,
    part: str | None = None,
    force: bool = False,
) -> ImportReport:
    """Write the LoRA that kohya's trainer, diffusers or mlx-lm wrote as a directory of peft's.

    So are DoRA with a magnitude for each output, and LoCon, LoHa and LoKr of LyCORIS.

    ``source`` is a safetensors file, or a directory with one. ``base`` is the model that it is for
    (a directory, a hub id or a factory), whose modules tell what the names mean; its weights are
    not read. ``part`` is the model of a pipeline that is meant (unet, transformer, text_encoder)
    where a file has adapters for several. Scales are multiplied into a factor, in fp32.

    Raises SurgeryError: PSG505 for a file that cannot be read, PSG506 for a name that means no
    module of the base, PSG507 for factors that do not fit it, PSG511 if it is not clear which
    adapter is meant, PSG501, PSG503 and PSG520 for what says that it is more than is read or
    than peft has, PSG523 for tensors of no spelling that is known, PSG601 to PSG603 for places, and
    what :func:`capture` raises of a base that cannot be built.
    """
    target = Path(out)
    with fresh(target, [str(source), str(base)], force) as folder:
        names = ForeignNames(read_header(foreign_file(Path(source)), "PSG505"))
        model = open_source(str(base)).module
        modules = [p for p, module in model.named_modules() if isinstance(module, WRAPPABLE)]
        parts = names.parts(modules)
        chosen = _chosen(parts, part, names.file.path)
        values = ForeignValues(names, frozenset(parts[chosen].values()))
        placed = ForeignPart(parts[chosen], tuple(modules)).placed()
        targets = {name: _target(model, path) for name, path in placed.items()}
        layers, config = adapted(values, targets)
        said = os.path.abspath(base) if os.path.isdir(base) else str(base)
        write_layers(folder, layers, {**config, BASE: said, **class_said(model)})
    ranks = {layer.module: layer.rank for layer in layers}
    strangers = {p: sum(len(names.tensors[n]) for n in parts[p]) for p in parts if p != chosen}
    return ImportReport(target, ranks, strangers)


def _chosen(parts: Mapping[str, Any], part: str | None, file: Path) -> str:
    """The model of a pipeline that is meant. PSG511 if that is not clear."""
    if part is None and len(parts) == 1:
        return next(iter(parts))
    if part is not None and part in parts:
        return part
    known = ", ".join(sorted(part for part in parts if part)) or "one model, without a name"
    message = f"'{file}' has adapters for {known}"
    raise SurgeryError("PSG511", message, "choose by `part` (--part)" if len(parts) > 1 else None)


def _target(model: nn.Module, path: str) -> ForeignTarget:
    """The module at a path. PSG507 if what peft adds to it is no change of its weight."""
    module: Any = model.get_submodule(path)
    odd = unlike(model, path)
    if odd is not None:
        raise SurgeryError("PSG507", f"'{path}' {odd}", "the adapter is no change of weights")
    kinds = {"is_table": nn.Embedding, "is_turned": Conv1D}
    said = {key: isinstance(module, kind) for key, kind in kinds.items()}
    return ForeignTarget(path, tuple(module.weight.shape), **said)
