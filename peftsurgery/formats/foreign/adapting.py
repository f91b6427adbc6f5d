"""What peft has for a module, of another program's tensors for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peftsurgery.checkpoint.arrays import Array
from peftsurgery.checkpoint.lora_folder import NewLayer, NewTensors, lora_config
from peftsurgery.errors import SurgeryError
from peftsurgery.formats.foreign.library import foreign_words
from peftsurgery.formats.foreign.reading import ForeignValues


@dataclass(frozen=True)
class ForeignTarget:
    """A module that tensors are for: its path, whether it is a table, its weight's shape and sizes.

    ``sizes`` are those of the change that two factors make: (out, in), and the taps of a kernel.
    """

    path: str
    is_table: bool
    shape: tuple[int, ...]
    sizes: tuple[int, ...]


def adapted(values: ForeignValues, name: str, target: ForeignTarget) -> NewTensors:
    """The tensors in peft's shapes. PSG507 if they do not fit the module, and what reading raises.

    Kernels of one tap are written with or without their further dimensions.
    """
    down, up = values.factors(name, target.path)
    (out, *into), rank = target.sizes, down.shape[0]
    ones = [1 for _ in into[1:]]
    wanted = ((rank, *into), (out, rank, *ones))
    for value, sizes in zip((down, up), wanted, strict=True):
        if value.shape[:2] != sizes[:2] or _taps(value.shape) != _taps(sizes):
            shapes = f"{list(down.shape)} and {list(up.shape)}"
            message = f"the factors of '{target.path}' are {shapes}"
            raise SurgeryError("PSG507", f"{message}, and its weight is {list(target.shape)}")
    kind = "embedding" if target.is_table else "linear"
    layer = NewLayer(target.path, kind, down.reshape(wanted[0]), up.reshape(wanted[1])).written
    magnitude = values.magnitude(name, target.sizes)
    if magnitude is None:
        return layer
    if target.is_table:
        message = f"'{name}' has a magnitude, and '{target.path}' is a table"
        raise SurgeryError("PSG520", message, "what it is the length of is not known")
    lengths: Array = magnitude.reshape((1, out, *ones) if ones else (out,))
    more = {foreign_words()["magnitude"]: lengths}
    return NewTensors(layer.module, rank, {**layer.tensors, **more})


def _taps(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape[2:] if size > 1]


def config_for(layers: Iterable[NewTensors], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The config of an adapter of these layers. PSG520 if only some of them have a magnitude."""
    words = foreign_words()
    has = {layer.module: words["magnitude"] in layer.tensors for layer in layers}
    if any(has.values()) and not all(has.values()):
        first = min(module for module, magnitude in has.items() if not magnitude)
        message = f"'{first}' has no magnitude, and other modules have one"
        raise SurgeryError("PSG520", message, "in peft all modules of an adapter have one, or none")
    return lora_config(ranks) | (words["with_magnitudes"] if all(has.values()) else {})
