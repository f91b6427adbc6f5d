"""A base's tensors as plain weights, whatever its quantiser keeps them as.

config.json names the quantiser; the tensors beside a module tell whether its weight is quantised.
Where a fold changes such a weight, all of them are written as plain numbers; where it does not,
they stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from peftsurgery.checkpoint.arrays import NUMBERS, Array, read_rows
from peftsurgery.checkpoint.codecs.bitsandbytes import FP4, INT8, NF4
from peftsurgery.checkpoint.codecs.codec import Codec, Said
from peftsurgery.checkpoint.codecs.fp8_blocks import FP8_BLOCKS
from peftsurgery.checkpoint.codecs.packed import AWQ, GPTQ
from peftsurgery.checkpoint.hashing import hash_of
from peftsurgery.errors import SurgeryError
from peftsurgery.files import read_object
from peftsurgery.model_files import ModelFiles
from peftsurgery.tensor_file import Tensor, TensorFile, size_of

CONFIG, QUANTISER = "config.json", "quantization_config"
# Files in which quantisers repeat what config.json says.
BESIDE = frozenset({"quantize_config.json", "quant_config.json"})
CODECS: Mapping[str, tuple[Codec, ...]] = MappingProxyType(
    {
        "fp8": (FP8_BLOCKS,),
        "gptq": (GPTQ,),
        "awq": (AWQ,),
        "bitsandbytes": (NF4, FP4, INT8),
    }
)
DTYPES = MappingProxyType({"float32": "F32", "float16": "F16", "bfloat16": "BF16"})


@dataclass(frozen=True)
class CodedWeight:
    """A weight that is kept by a codec; ``tensor`` is what it is as a plain one."""

    tensor: Tensor
    codec: Codec
    parts: Mapping[str, tuple[TensorFile, Tensor]]
    said: Said

    def values(self) -> Array:
        """The weight (out, in) in fp32. PSG416 for parts that do not fit each other."""
        parts = {name: read_rows(*where) for name, where in self.parts.items()}
        try:
            found = self.codec.decode(parts, self.said)
        except (ValueError, IndexError, KeyError, TypeError) as error:
            message = f"'{self.tensor.name}' is no weight in {self.codec.name}: {error}"
            raise SurgeryError("PSG416", message) from None
        if found.shape != self.tensor.shape:
            shapes = f"{list(found.shape)}, not {list(self.tensor.shape)}"
            raise SurgeryError("PSG416", f"'{self.tensor.name}' in {self.codec.name} is {shapes}")
        return found

    @cached_property
    def hashes(self) -> dict[str, str]:
        """The hash of each part, by the name of its tensor."""
        return {tensor.name: hash_of(file, tensor) for file, tensor in self.parts.values()}


@dataclass(frozen=True)
class PlainView:
    """A base's files, with the weights of its codecs as plain ones."""

    files: ModelFiles
    coded: Mapping[str, CodedWeight] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The base's directory."""
        return self.files.folder

    @cached_property
    def tensors(self) -> dict[str, tuple[TensorFile, Tensor]]:
        """Every tensor by its name, with the file in which it stands."""
        return {each.name: (file, each) for file in self.files.files for each in self.of(file)}

    @cached_property
    def _hidden(self) -> dict[str, str | None]:
        """What stands in the place of each part of a coded weight; None for nothing."""
        found: dict[str, str | None] = {}
        for name, weight in self.coded.items():
            found |= dict.fromkeys((tensor.name for _, tensor in weight.parts.values()), None)
            found[weight.parts["weight"][1].name] = name
        return found

    def of(self, file: TensorFile) -> Iterator[Tensor]:
        """The tensors of a file in the order in which they lie there."""
        for tensor in sorted(file.tensors.values(), key=lambda each: each.start):
            name = self._hidden.get(tensor.name, tensor.name)
            if name is not None:
                yield self.coded[name].tensor if name in self.coded else tensor

    def config(self) -> bytes:
        """config.json without its quantiser."""
        said = read_object(self.folder / CONFIG, "PSG206")
        said.pop(QUANTISER)
        return (json.dumps(said, indent=2) + "\n").encode()


def plain_view(files: ModelFiles) -> PlainView:
    """A base with plain weights where their codec is known. PSG206 for a config that is damaged."""
    if not (files.folder / CONFIG).is_file():
        return PlainView(files)
    config = read_object(files.folder / CONFIG, "PSG206")
    said = config.get(QUANTISER)
    if not isinstance(said, dict):
        return PlainView(files)
    dtype = DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))), "BF16")
    held, coded = files.tensors, dict[str, CodedWeight]()
    for codec in CODECS.get(str(said.get("quant_method")), ()):
        if codec.refuses(said) is None:
            coded |= {each.tensor.name: each for each in _found(codec, held, said, dtype)}
    return PlainView(files, coded)


def needed_view(files: ModelFiles, changed: Collection[str]) -> PlainView:
    """The view in which a fold works: plain where it changes a coded weight, else the files'."""
    view = plain_view(files)
    return view if view.coded.keys() & set(changed) else PlainView(files)


def _found(
    codec: Codec, held: Mapping[str, tuple[TensorFile, Tensor]], said: Said, dtype: str
) -> Iterator[CodedWeight]:
    """The weights that a codec keeps among the tensors of a base."""
    needed = {name: end for name, end in codec.parts.items() if name not in codec.optional}
    telling = f".{list(needed.values())[-1]}"
    for key in held:
        module = key.removesuffix(telling)
        names = {name: f"{module}.{end}" for name, end in codec.parts.items()}
        parts = {name: held[full] for name, full in names.items() if full in held}
        readable = all(tensor.dtype in NUMBERS for _, tensor in parts.values())
        if module == key or not needed.keys() <= parts.keys() or not readable:
            continue
        looks: dict[str, Any] = {
            name: read_rows(*where) if name in codec.small else _stand_in(where[1])
            for name, where in parts.items()
        }
        try:
            shape = codec.shape(looks, said)
            size = size_of(dtype, shape)
        except (ValueError, IndexError, KeyError, TypeError):
            continue  # it is no weight of this codec, and stays what it is
        yield CodedWeight(Tensor(f"{module}.weight", dtype, shape, 0, size), codec, parts, said)


def _stand_in(tensor: Tensor) -> Array:
    """An array of a tensor's shape that takes no memory."""
    return np.broadcast_to(np.zeros((), NUMBERS[tensor.dtype]), tensor.shape)
