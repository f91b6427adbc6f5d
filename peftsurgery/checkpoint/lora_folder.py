"""Plain LoRA adapters in directories of peft's format, read and written without torch.

    adapter_config.json          the rank, alpha and their patterns by module
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight and its like

An adapter is read layer by layer: what a module's weight is changed by is ``scale * up @ down``.
What is more than that (another method, biases, modules that are saved whole) is refused by name.
The words of the format are in ``plain_lora.yaml``.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import yaml

from peftsurgery.checkpoint.arrays import FLOATS, Array, read_rows
from peftsurgery.checkpoint.tensor_bytes import read_bytes
from peftsurgery.errors import SurgeryError
from peftsurgery.files import absence, read_object
from peftsurgery.language.paths import full_match
from peftsurgery.tensor_file import Tensor, TensorFile, header_of, laid_out, read_header

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
BASE = "base_model_name_or_path"


@cache
def lora_words() -> dict[str, Any]:
    """The table of the format's words, read once."""
    table = Path(__file__).with_name("plain_lora.yaml")
    found: dict[str, Any] = yaml.safe_load(table.read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True)
class LoraLayer:
    """What an adapter adds to the weight of a module: ``scale * up @ down``.

    ``down`` is (rank, in), of a convolution (rank, in, height, width), of an embedding (rank,
    tokens); ``up`` is (out, rank), of a convolution (out, rank, 1, 1). ``kind`` tells what an
    embedding is from a linear; a convolution is a linear of four dimensions.
    """

    module: str
    kind: str
    scale: float
    file: TensorFile
    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """The size that both share."""
        return self.down.shape[0]

    def read(self) -> tuple[Array, Array]:
        """``down`` and ``up`` in fp32 (fp64 if so stored), as they are. PSG505 if not finite."""
        halves = []
        for tensor in (self.down, self.up):
            stored = read_rows(self.file, tensor)
            value = stored.astype(np.float64 if tensor.dtype == "F64" else np.float32)
            if not np.isfinite(value).all():
                message = f"{self.file.path}: '{tensor.name}' holds NaN or infinity"
                raise SurgeryError("PSG505", message)
            halves.append(value)
        return halves[0], halves[1]


@dataclass(frozen=True)
class LoraFolder:
    """A plain LoRA adapter: its config, and its layers in the order of their modules' names.

    ``tables`` are copies of the base's tables of tokens that come with it.
    """

    folder: Path
    config: Mapping[str, Any]
    file: TensorFile
    layers: Mapping[str, LoraLayer]
    tables: Mapping[str, Tensor]


def read_lora_config(folder: Path) -> dict[str, Any]:
    """The config of an adapter, whatever it is of. PSG501 if there is none that can be read."""
    if not (folder / CONFIG).is_file():
        raise SurgeryError("PSG501", absence(folder, CONFIG))
    return read_object(folder / CONFIG, "PSG501")


def read_lora_folder(folder: Path, said: str | None = None) -> LoraFolder:
    """The plain LoRA adapter in a directory; ``said`` is what errors call it, if not its path.

    Raises SurgeryError: PSG501 and PSG503 for a config that cannot be read or used, PSG505 to
    PSG507 for tensors that cannot, PSG520 for what is more than a plain LoRA.
    """
    config = read_lora_config(folder)
    _check_plain(said or f"'{folder}'", config)
    if not (folder / TENSORS).exists():
        raise SurgeryError(
            "PSG505", f"'{folder}' has no {TENSORS}", "pickle files are never loaded"
        )
    file = read_header(folder / TENSORS, "PSG505")
    if not file.tensors:
        raise SurgeryError("PSG505", f"{file.path} holds no tensors")
    table = f".{lora_words()['table']}"
    tables = {name: t for name, t in file.tensors.items() if name.endswith(table)}
    layers = {layer.module: layer for layer in _layers(folder, config, file, tables)}
    return LoraFolder(folder, config, file, dict(sorted(layers.items())), tables)


def strangers(config: Mapping[str, Any]) -> Iterator[str]:
    """The keys of a config that make it more, or other, than that of a plain LoRA."""
    words = lora_words()
    for key, allowed in words["needed"].items():
        value = config.get(key)
        if not any(value is choice or value == choice for choice in allowed):
            yield key
    known = {*words["needed"], *words["known"]}
    for key, value in config.items():
        if key not in known and value not in (None, False, "", [], {}):
            yield key


def _check_plain(said: str, config: Mapping[str, Any]) -> None:
    for key in strangers(config):
        message = f"{said} is no plain LoRA: its {key} is {config.get(key)!r:.60}"
        hint = "turn it into one: as_lora, or `peftsurgery export --as-lora RANK`"
        raise SurgeryError("PSG520", message, hint)


def _layers(
    folder: Path, config: Mapping[str, Any], file: TensorFile, tables: Mapping[str, Tensor]
) -> Iterator[LoraLayer]:
    """The layers of a file, each with both of its tensors and the scale that the config says."""
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, tensor in file.tensors.items():
        if name in tables:
            continue
        module, kind, part = _parsed(file, name)
        found.setdefault((module, kind), {})[part] = tensor
    modules = [module for module, _ in found]
    twice = next((name for name, count in Counter(modules).items() if count > 1), None)
    if twice is not None:
        raise SurgeryError("PSG507", f"{file.path} has two kinds of adapters for '{twice}'")
    scales = layer_scales(folder, config)
    for (module, kind), parts in found.items():
        if len(parts) != 2:
            here, words = next(iter(parts)), lora_words()["tensors"][kind]
            missing = next(suffix for part, suffix in words.items() if part != here)
            raise SurgeryError("PSG507", f"'{parts[here].name}' has no '{missing}' beside it")
        _check_shapes(parts["down"], parts["up"])
        rank, scale = scales(module)
        if rank != parts["down"].shape[0]:
            message = f"'{parts['down'].name}' is of rank {parts['down'].shape[0]}"
            raise SurgeryError("PSG507", f"{message}, and the config says {rank}")
        yield LoraLayer(module, kind, scale, file, parts["down"], parts["up"])


def _parsed(file: TensorFile, name: str) -> tuple[str, str, str]:
    """The module, the kind and the part that a tensor's name says. PSG506, PSG520."""
    if not name.startswith(PREFIX):
        raise SurgeryError("PSG506", f"the tensor '{name}' does not begin with '{PREFIX}'")
    path = name.removeprefix(PREFIX)
    for kind, suffixes in lora_words()["tensors"].items():
        for part, suffix in suffixes.items():
            if path.endswith(f".{suffix}"):
                return path.removesuffix(f".{suffix}"), kind, part
    message = f"{file.path} is of no plain LoRA: it has '{name}'"
    raise SurgeryError("PSG520", message, "turn it into one: `peftsurgery export --as-lora RANK`")


def _check_shapes(down: Tensor, up: Tensor) -> None:
    """Refuse a pair of tensors that are no factors of one change. PSG507."""
    for tensor in (down, up):
        if tensor.dtype not in FLOATS:
            raise SurgeryError("PSG505", f"'{tensor.name}' holds {tensor.dtype}, which is no float")
    fits = len(down.shape) == len(up.shape) and len(down.shape) in (2, 4)
    if not fits or down.shape[0] != up.shape[1] or any(size != 1 for size in up.shape[2:]):
        shapes = f"{list(down.shape)} and {list(up.shape)}"
        raise SurgeryError("PSG507", f"'{down.name}' and '{up.name}' do not fit: {shapes}")
    if not down.count or not up.count:
        raise SurgeryError("PSG507", f"'{down.name}' is of rank 0")


def layer_scales(folder: Path, config: Mapping[str, Any]) -> Callable[[str], tuple[int, float]]:
    """A function that gives the rank and the scale of a module. PSG503 for values that are none.

    ``folder`` is what errors call the place of the config.
    """
    patterns = {}
    for key in ("rank_pattern", "alpha_pattern"):
        values = config.get(key) or {}
        if not isinstance(values, dict):
            raise SurgeryError("PSG503", f"{folder}: {key} is no object")
        patterns[key] = [(full_match(rf"(.*\.)?({text})"), value) for text, value in values.items()]

    def said(module: str, key: str, pattern: str) -> Any:
        return next((value for fits, value in patterns[pattern] if fits(module)), config.get(key))

    def scale(module: str) -> tuple[int, float]:
        rank, alpha = said(module, "r", "rank_pattern"), said(module, "lora_alpha", "alpha_pattern")
        if type(rank) is not int or rank < 1:
            raise SurgeryError("PSG503", f"{folder}: the rank of '{module}' cannot be {rank!r:.60}")
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise SurgeryError("PSG503", f"{folder}: alpha of '{module}' cannot be {alpha!r:.60}")
        return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scale


@dataclass(frozen=True)
class NewTensors:
    """What is to be written of a module: its tensors by their suffixes, and the rank they share."""

    module: str
    rank: int
    tensors: Mapping[str, Array]


@dataclass(frozen=True)
class NewLayer:
    """A layer to be written: ``up @ down`` is added to the module's weight; scale 1.

    The shapes are those of :class:`LoraLayer`.
    """

    module: str
    kind: str
    down: Array
    up: Array

    @property
    def written(self) -> NewTensors:
        """The layer as its tensors."""
        names = lora_words()["tensors"][self.kind]
        values = {names["down"]: self.down, names["up"]: self.up}
        return NewTensors(self.module, self.down.shape[0], values)


def write_lora(
    part: Path,
    layers: Iterable[NewLayer],
    others: Mapping[str, Any],
    tables: Mapping[str, tuple[TensorFile, Tensor]] = MappingProxyType({}),
) -> int:
    """Write a plain LoRA adapter to the directory ``part``, one layer in memory at a time.

    ``others`` are further keys of its config, by which those of the table are overridden;
    ``tables`` are copied. Returns how many layers it has. PSG603 if the system refuses.
    """
    every = (layer.written for layer in layers)
    return write_layers(part, every, lambda ranks: {**lora_config(ranks), **others}, tables)


def write_layers(
    part: Path,
    layers: Iterable[NewTensors],
    config: Mapping[str, Any] | Callable[[Mapping[str, int]], Mapping[str, Any]],
    tables: Mapping[str, tuple[TensorFile, Tensor]] = MappingProxyType({}),
) -> int:
    """Write an adapter of any method as :func:`write_lora` does.

    ``config`` is its config, or a function that makes it of the ranks.
    """
    ranks: dict[str, int] = {}
    described: list[tuple[str, str, tuple[int, ...]]] = []
    try:
        part.mkdir()
        spool = part / f".{TENSORS}.spool"
        with spool.open("wb") as stream:
            for layer in layers:
                ranks[layer.module] = layer.rank
                for suffix, value in layer.tensors.items():
                    described.append((f"{PREFIX}{layer.module}.{suffix}", "F32", value.shape))
                    stream.write(np.ascontiguousarray(value, np.float32).tobytes())
            for name, (file, tensor) in tables.items():
                described.append((name, tensor.dtype, tensor.shape))
                stream.write(read_bytes(file, tensor, 0, tensor.size))
        with spool.open("rb") as read, (part / TENSORS).open("wb") as stream:
            stream.write(header_of(laid_out(described), {"format": "pt"}))
            while block := read.read(2**20):
                stream.write(block)
        spool.unlink()
        said = config(ranks) if callable(config) else config
        content = json.dumps(said, indent=2, sort_keys=True)
        (part / CONFIG).write_text(content + "\n", encoding="utf-8")
    except OSError as error:
        raise SurgeryError("PSG603", f"'{part}' cannot be written: {error.strerror}") from error
    return len(ranks)


def lora_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The config of an adapter whose modules have these ranks and scale 1."""
    return {**lora_words()["written"], **said_ranks(ranks, "lora_alpha")}


def said_ranks(ranks: Mapping[str, int], alpha: str) -> dict[str, Any]:
    """The keys of a config that say these ranks, and scale 1 by the key of ``alpha``."""
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    odd = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
    said = {"r": usual, alpha: usual, "rank_pattern": odd, "alpha_pattern": odd}
    return {**said, "target_modules": sorted(ranks)}
