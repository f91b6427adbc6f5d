"""The plain LoRA that an adapter is, and what all programs that take nothing else refuse.

An adapter is written as peft has it, which refuses what has no such form, and read back layer by
layer without torch; from there each program's directory is a table and a thin translation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from peftsurgery.capture import GraphModel
from peftsurgery.capture.tensors import tensor_names
from peftsurgery.checkpoint.arrays import Array
from peftsurgery.checkpoint.lora_folder import LoraFolder, LoraLayer, read_lora_folder
from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.formats.peft.directory import to_peft
from peftsurgery.outputs import fresh
from peftsurgery.surgery.model.operated import OperatedModel


@contextmanager
def plain_lora(model: OperatedModel, name: str | None) -> Iterator[LoraFolder]:
    """The adapter ``name`` (or the only one) as layers, while the body runs.

    Raises what :func:`to_peft` raises, PSG520 if it is more than a plain LoRA, PSG521 if it comes
    with a vocabulary of its own.
    """
    with TemporaryDirectory() as temporary:
        folder = Path(temporary, "adapter")
        to_peft(model, folder, name)
        read = read_lora_folder(folder, said=f"the adapter '{name or model.adapters[0]}'")
        if read.tables:
            raise unsaid(f"the base was given other tokens ('{min(read.tables)}')")
        yield read


def unsaid(why: str, hint: str = "fold, or leave that part of the adapter out") -> SurgeryError:
    """The refusal of what a program's format cannot say. PSG521."""
    return SurgeryError("PSG521", f"the program cannot be given this adapter: {why}", hint)


def check_alone(model: OperatedModel, layer: LoraLayer, program: str) -> None:
    """Refuse a layer of a weight that is tied to another: the program changes both. PSG521."""
    others = tensor_names(model.source.module)[f"{layer.module}.weight"]
    if len(others) > 1:
        raise unsaid(f"'{layer.module}' is tied to another weight, and {program} has one for both")


def check_flat(layer: LoraLayer, program: str) -> None:
    """Refuse a convolution. PSG521."""
    if len(layer.down.shape) != 2:
        raise unsaid(f"'{layer.module}' is a convolution, and {program} takes linears")


def padded(layer: LoraLayer, rank: int) -> tuple[Array, Array]:
    """``down`` and ``up`` at a larger rank, by zeros, with the scale in ``up``."""
    down, up = layer.read()
    more = rank - layer.rank
    wide = [(0, 0)] * (down.ndim - 1)
    return np.pad(down, [(0, more), *wide]), np.pad(
        up * layer.scale, [(0, 0), (0, more), *wide[1:]]
    )


def row_of(model: OperatedModel, table: dict[str, Any], key: str, program: str) -> Any:
    """The row of a table for a model of this kind. PSG522 if the program's names are not known."""
    if key not in table:
        message = f"{program}'s names for the modules of '{key}' are not known"
        raise SurgeryError("PSG522", message, did_you_mean(key, table))
    return table[key]


def model_type(model: OperatedModel) -> str:
    """What transformers calls the architecture of the base; the class's name for other modules."""
    module = model.source.module
    return str(getattr(getattr(module, "config", None), "model_type", type(module).__name__))


def config_number(model: OperatedModel, key: str) -> int:
    """A size that the config of the base says."""
    return int(getattr(getattr(model.source.module, "config", None), key))


def places_read(model: GraphModel) -> list[str | Path]:
    """The places that a model was made of, which nothing is written into."""
    return [place for place in model.read_from() if place is not None]


def in_layer(module: str, layers: str) -> tuple[int, str] | None:
    """The number of the layer that a module is in, and its path there; None outside of layers."""
    found = re.fullmatch(rf"{re.escape(layers)}\.(\d+)\.(.+)", module)
    return None if found is None else (int(found[1]), found[2])


@contextmanager
def one_file(out: Path, plain: str, force: bool, inputs: list[str | Path]) -> Iterator[Path]:
    """A file to be written: ``out`` itself if it is called like one, else ``plain`` inside ``out``.

    Raises what :func:`fresh` raises.
    """
    if out.suffix == Path(plain).suffix and not out.is_dir():
        with fresh(out, inputs, force) as part:
            yield part
    elif out.is_dir():
        with fresh(out / plain, inputs, force) as part:
            yield part
    else:
        with fresh(out, inputs, force) as part:
            part.mkdir()
            yield part / plain
