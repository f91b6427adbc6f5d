"""A base's tensors as plain weights, whatever its quantiser keeps them as.

config.json names the quantiser; the tensors beside a module tell whether its weight is quantised.
Where a fold changes such a weight, all of them are written as plain numbers, or those that change
are quantised again; where it does not, they stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from peftsurgery.checkpoint.arrays import FLOATS, NUMBERS, Array, read_columns, read_rows
from peftsurgery.checkpoint.hashing import hash_of
from peftsurgery.errors import SurgeryError
from peftsurgery.files import read_object
from peftsurgery.model_files import ModelFiles
from peftsurgery.stand_ins import stand_in_of
from peftsurgery.tensor_file import Tensor, TensorFile, size_of

if TYPE_CHECKING:
    from peftsurgery.checkpoint.codecs.bands import Bands
    from peftsurgery.checkpoint.codecs.codec import Codec, Said

CONFIG, QUANTISER = "config.json", "quantization_config"
# Files in which quantisers repeat what config.json says.
BESIDE = frozenset({"quantize_config.json", "quant_config.json"})
DTYPES = MappingProxyType({"float32": "F32", "float16": "F16", "bfloat16": "BF16"})


@dataclass(frozen=True)
class CodedWeight:
    """A weight that is kept by a codec; ``tensor`` is what it is as a plain one.

    ``bands`` are those in which it is read; None for one that is read as a whole.
    """

    tensor: Tensor
    codec: Codec
    parts: Mapping[str, tuple[TensorFile, Tensor]]
    said: Said
    bands: Bands | None = None

    def values(self, rows: slice | None = None) -> Array:
        """The weight, or a band of its rows, in fp32.

        PSG416 for parts that do not fit each other.
        """
        return self.values_of(self.stored(rows), rows)

    def stored(self, rows: slice | None = None) -> dict[str, Array]:
        """The parts, or what of them belongs to a band, as the files have them."""
        if rows is None or self.bands is None:
            return {name: read_rows(*where) for name, where in self.parts.items()}
        whole = {name: read_rows(*self.parts[part]) for name, part in self.bands.whole.items()}
        return whole | {name: self._part(name, self.bands, rows) for name in self.parts}

    def _part(self, name: str, bands: Bands, rows: slice) -> Array:
        """What of a part belongs to a band."""
        file, tensor = self.parts[name]
        if name not in bands.cut:
            return read_rows(file, tensor)
        cut = bands.cut[name]
        mine = cut.of(rows)
        read = read_columns if cut.axis else read_rows
        return read(file, tensor, mine.start, min(mine.stop, tensor.shape[cut.axis]))

    def values_of(self, parts: Mapping[str, Array], rows: slice | None = None) -> Array:
        """The weight of some parts in fp32. PSG416 for those that do not fit."""
        wanted = self.tensor.shape
        if rows is not None:
            wanted = (rows.stop - rows.start, *wanted[1:])
        try:
            found = self.codec.decode(parts, self.said)
        except (ValueError, IndexError, KeyError, TypeError) as error:
            message = f"'{self.tensor.name}' is no weight in {self.codec.name}: {error}"
            raise SurgeryError("PSG416", message) from None
        if found.shape != wanted:
            shapes = f"{list(found.shape)}, not {list(wanted)}"
            raise SurgeryError("PSG416", f"'{self.tensor.name}' in {self.codec.name} is {shapes}")
        return found

    @cached_property
    def hashes(self) -> dict[str, str]:
        """The hash of each part, by the name of its tensor."""
        return {tensor.name: hash_of(file, tensor) for file, tensor in self.parts.values()}


@dataclass(frozen=True)
class PlainView:
    """A base's files, with the weights of its codecs as plain ones.

    ``again`` are the weights that are quantised again: then the files that are written hold what
    those of the base hold. ``added`` are tensors that are written besides, by the names of those
    that have their values in the base, and that they follow. ``resized`` are tensors that are
    written with another number of rows.
    """

    files: ModelFiles
    coded: Mapping[str, CodedWeight] = field(default_factory=dict)
    again: frozenset[str] = frozenset()
    added: Mapping[str, str] = field(default_factory=dict)
    resized: Mapping[str, Tensor] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)
    refused: str | None = None
    aside: frozenset[str] = frozenset()

    @property
    def is_plain(self) -> bool:
        """Whether weights of codecs are written as plain numbers."""
        return bool(self.coded) and not self.again

    @cached_property
    def held(self) -> dict[str, tuple[TensorFile, Tensor]]:
        """Every tensor of the files by its name, and those that are added."""
        found = self.files.tensors
        added = {name: found[first] for name, first in self.added.items()}
        return found | {n: (file, replace(each, name=n)) for n, (file, each) in added.items()}

    @cached_property
    def again_by_part(self) -> dict[str, str]:
        """The weights that are quantised again, by the tensors that are parts of them."""
        found = ((name, self.coded[name].parts.values()) for name in self.again)
        return {tensor.name: name for name, parts in found for _, tensor in parts}

    @property
    def folder(self) -> Path:
        """The base's directory."""
        return self.files.folder

    @cached_property
    def tensors(self) -> dict[str, tuple[TensorFile, Tensor]]:
        """Every tensor by its name as a plain one, with the file in which it stands."""
        return {
            each.name: (file, each)
            for file in self.files.files
            for tensor in self._plain(file)
            for each in self._with_added(tensor)
        }

    @cached_property
    def _hidden(self) -> dict[str, str | None]:
        """What stands in the place of each part of a coded weight; None for nothing."""
        found: dict[str, str | None] = dict.fromkeys(self.aside)
        for name, weight in self.coded.items():
            found |= dict.fromkeys((tensor.name for _, tensor in weight.parts.values()), None)
            found[weight.parts["weight"][1].name] = name
        return found

    def of(self, file: TensorFile) -> Iterator[Tensor]:
        """The tensors that are written to a file, in the order in which they lie there."""
        for tensor in self._stored(file) if self.again else self._plain(file):
            yield from self._with_added(tensor)

    def _with_added(self, tensor: Tensor) -> Iterator[Tensor]:
        names = [name for name, first in self.added.items() if first == tensor.name]
        for name in (tensor.name, *names):
            yield self.resized.get(name, replace(tensor, name=name))

    def _stored(self, file: TensorFile) -> list[Tensor]:
        return sorted(file.tensors.values(), key=lambda each: each.start)

    def _plain(self, file: TensorFile) -> Iterator[Tensor]:
        for tensor in self._stored(file):
            name = self._hidden.get(tensor.name, tensor.name)
            if name is not None:
                yield self.coded[name].tensor if name in self.coded else tensor

    def why_unread(self, name: str | None = None) -> str | None:
        """Why a weight, or the first of those that are not, is read by no codec."""
        if name is not None:
            return self.unread.get(name, self.refused)
        return self.refused or next(
            (f"'{weight}' is not read: {why}" for weight, why in self.unread.items()), None
        )

    def config(self, values: Mapping[str, Any] = MappingProxyType({})) -> bytes:
        """config.json with other values by dotted paths, and without a quantiser of plain weights.

        PSG206 if it is damaged.
        """
        said = read_object(self.folder / CONFIG, "PSG206")
        if self.is_plain:
            said.pop(QUANTISER)
        for path, value in values.items():
            *parents, key = path.split(".")
            place = said
            for each in parents:
                place = place.setdefault(each, {})
            place[key] = value
        return (json.dumps(said, indent=2) + "\n").encode()


def plain_view(files: ModelFiles) -> PlainView:
    """A base with plain weights where their codec is known. PSG206 for a config that is damaged."""
    if not (files.folder / CONFIG).is_file():
        return PlainView(files)
    config = read_object(files.folder / CONFIG, "PSG206")
    said = config.get(QUANTISER)
    if not isinstance(said, dict):
        return PlainView(files)
    from peftsurgery.checkpoint.codecs.known import CODECS  # which few bases need

    dtype = DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))), "BF16")
    coded, unread, refused = dict[str, CodedWeight](), dict[str, str](), None
    aside = set[str]()
    for codec in CODECS.get(str(said.get("quant_method")), ()):
        why = codec.refuses(said)
        refused = refused or why
        aside |= {name for name in files.tensors if name.endswith(codec.aside(said))}
        for name, found in _found(codec, files.tensors, said, dtype) if why is None else ():
            if isinstance(found, CodedWeight):
                coded[name] = found
            else:
                unread.setdefault(name, found)
    unread = {name: why for name, why in unread.items() if name not in coded}
    hidden = frozenset(aside if coded else ())
    return PlainView(files, coded, unread=unread, refused=None if coded else refused, aside=hidden)


def needed_view(files: ModelFiles, changed: Collection[str], requantise: bool = False) -> PlainView:
    """The view in which a fold works: plain where it changes a coded weight, else the files'.

    With ``requantise`` coded weights that change are quantised again. PSG416 if the base has none,
    and for weights that would be written plain and cannot be read.
    """
    view = plain_view(files)
    if requantise and not view.coded:
        why = view.why_unread()
        message = f"'{files.folder}' has no quantised weights that are read, so none to write again"
        raise SurgeryError(
            "PSG416", message + (f" ({why})" if why else ""), "leave out --requantise"
        )
    mine = view.coded.keys() & set(changed)
    if not mine:
        return PlainView(files, unread=view.unread, refused=view.refused)
    if not requantise and view.unread:
        message = f"'{files.folder}' cannot be written plain: {view.why_unread()}"
        raise SurgeryError("PSG416", message, "--requantise leaves alone what does not change")
    return replace(view, again=frozenset(mine)) if requantise else view


def _found(
    codec: Codec, held: Mapping[str, tuple[TensorFile, Tensor]], said: Said, dtype: str
) -> Iterator[tuple[str, CodedWeight | str]]:
    """The weights that a codec keeps among the tensors of a base, or why they are none, by name."""
    ends = [end for name, end in codec.parts.items() if name not in codec.optional]
    for module in dict.fromkeys(
        name.removesuffix(end)
        for name, (_, tensor) in held.items()
        for end in ends
        if name.endswith(end) and (end != codec.plain or tensor.dtype not in FLOATS)
    ):
        try:
            found = _read(codec, module, held, said, dtype)
        except (ValueError, IndexError, KeyError, TypeError) as error:
            yield module + codec.plain, str(error)
            continue
        if found is not None:
            yield module + codec.plain, found


def _read(
    codec: Codec,
    module: str,
    held: Mapping[str, tuple[TensorFile, Tensor]],
    said: Said,
    dtype: str,
) -> CodedWeight | None:
    """The weight of a module in a codec; None if it is another's. ValueError if it is none."""
    mine = codec.scheme(module, said)
    if mine is None:
        return None
    parts = dict[str, tuple[TensorFile, Tensor]]()
    for name, end in codec.parts.items():
        if module + end in held:
            parts[name] = held[module + end]
            if parts[name][1].dtype not in NUMBERS:
                raise ValueError(f"'{module}{end}' is kept in {parts[name][1].dtype}")
        elif name not in codec.optional:
            raise ValueError(f"there is no '{module}{end}'")
    looks: dict[str, Any] = {
        name: read_rows(*where) if name in codec.small else _stand_in(where[1])
        for name, where in parts.items()
    }
    shape, bands = codec.shape(looks, mine), codec.bands(looks, mine)
    tensor = Tensor(module + codec.plain, dtype, shape, 0, size_of(dtype, shape))
    return CodedWeight(tensor, codec, parts, mine, _readable(bands, parts.values()))


def _readable(bands: Bands | None, parts: Iterable[tuple[TensorFile, Tensor]]) -> Bands | None:
    """Bands, unless each row of a part would be a read of its own of files elsewhere."""
    is_across = bands is not None and any(cut.axis for cut in bands.cut.values())
    is_apart = any(stand_in_of(file.path) is not None for file, _ in parts)
    return None if is_across and is_apart else bands


def _stand_in(tensor: Tensor) -> Array:
    """An array of a tensor's shape that takes no memory."""
    return np.broadcast_to(np.zeros((), NUMBERS[tensor.dtype]), tensor.shape)
