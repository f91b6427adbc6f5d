"""What peft has for a module, of another program's tensors for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peftsurgery.checkpoint.arrays import Array
from peftsurgery.checkpoint.lora_folder import NewLayer, NewTensors, lora_config
from peftsurgery.errors import SurgeryError
from peftsurgery.formats.foreign.library import foreign_words
from peftsurgery.formats.foreign.lycoris import (
    hadamard,
    hadamard_config,
    kronecker,
    kronecker_config,
)
from peftsurgery.formats.foreign.reading import ForeignValues
from peftsurgery.formats.foreign.target import ForeignTarget

Placed = Mapping[str, ForeignTarget]


def adapted(values: ForeignValues, targets: Placed) -> tuple[list[NewTensors], Mapping[str, Any]]:
    """The tensors in peft's shapes for each name's module, and the config of the adapter.

    PSG507 for what does not fit a module, PSG520 for what peft cannot say, and what reading raises.
    """
    make, config = KINDS[values.names.spelling.kind]
    layers = [make(values, name, target) for name, target in targets.items()]
    ranks = {layer.module: layer.rank for layer in layers}
    return layers, config(layers, [*targets.values()], ranks)


def product(values: ForeignValues, name: str, target: ForeignTarget) -> NewTensors:
    """Two factors, and a magnitude if there is one.

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


def product_config(
    layers: Sequence[NewTensors], targets: Sequence[ForeignTarget], ranks: Mapping[str, int]
) -> dict[str, Any]:
    """The config of an adapter of factors. PSG520 if only some modules have a magnitude."""
    words = foreign_words()
    has = {layer.module: words["magnitude"] in layer.tensors for layer in layers}
    if any(has.values()) and not all(has.values()):
        first = min(module for module, magnitude in has.items() if not magnitude)
        message = f"'{first}' has no magnitude, and other modules have one"
        raise SurgeryError("PSG520", message, "in peft all modules of an adapter have one, or none")
    is_turned = any(target.is_turned for target in targets)
    more = words["with_magnitudes"] if all(has.values()) else {}
    return lora_config(ranks) | more | {"fan_in_fan_out": is_turned}


KINDS = {
    "product": (product, product_config),
    "hadamard": (hadamard, hadamard_config),
    "kronecker": (kronecker, kronecker_config),
}
