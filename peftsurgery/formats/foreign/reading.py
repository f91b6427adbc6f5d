"""The values of another program's LoRA: the two factors of a module, and their scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from peftsurgery.checkpoint.arrays import FLOATS, Array, read_rows
from peftsurgery.checkpoint.lora_folder import layer_scales, strangers
from peftsurgery.errors import SurgeryError
from peftsurgery.files import parse_object, read_object
from peftsurgery.formats.foreign.library import foreign_words
from peftsurgery.formats.foreign.names import ForeignNames
from peftsurgery.formats.words import brief
from peftsurgery.tensor_file import Tensor


@dataclass(frozen=True)
class ForeignValues:
    """The values that a file has for the modules of one model.

    ``beginnings`` are what the names of the model's modules begin with.
    """

    names: ForeignNames
    beginnings: frozenset[str]

    def factors(self, name: str, path: str) -> tuple[Array, Array]:
        """``down`` (rank, in, ...) and ``up`` (out, rank, ...) in fp32, with the scale in ``up``.

        ``name`` is what the file calls the module at ``path``. PSG503 and PSG520 for a scale that
        is none, PSG505 for values that are no finite numbers, PSG507 for a factor that is missing.
        """
        down, up = self._factor(name, "down"), self._factor(name, "up")
        if "core" in self.names.tensors[name]:
            down = self._with_core(name, down)
        if min(down.ndim, up.ndim) < 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
            shapes = f"{list(down.shape)} and {list(up.shape)}"
            raise SurgeryError("PSG507", f"the factors of '{name}' do not fit: {shapes}")
        return down, up * np.float32(self.scale(name, path, down.shape[0]))

    def _with_core(self, name: str, down: Array) -> Array:
        """``down`` and the core after it as one factor: ``sum(core[i, j, k, l] down[j, c])``.

        LoCon of LyCORIS has these for a kernel of several taps: a convolution of one tap, one of
        all taps, and ``up``.
        """
        core = self._factor(name, "core")
        fits = core.ndim > 2 and core.shape[:2] == (len(down), len(down))
        if down.ndim < 2 or not fits or any(size != 1 for size in down.shape[2:]):
            shapes = f"{list(core.shape)}, and its factors are of {list(down.shape)}"
            raise SurgeryError("PSG507", f"the core of '{name}' is {shapes}")
        flat = down.reshape(down.shape[:2]).astype(np.float64)
        value: Array = np.einsum("ij...,jc->ic...", core.astype(np.float64), flat)
        return value.astype(np.float32)

    def magnitude(self, name: str, sizes: tuple[int, ...]) -> Array | None:
        """The lengths (out,) that the rows of a module's weight are given; None if it has none.

        ``sizes`` are those of the weight, (out, in, ...). PSG520 for lengths of its columns, which
        LyCORIS trains too (without ``wd_on_out``): peft has no such adapters. PSG507 for others.
        """
        tensor = self.names.tensors[name].get("magnitude")
        if tensor is None:
            return None
        out, into, *taps = sizes
        ones = tuple(1 for _ in taps)
        rows = {(out,), (out, 1, *ones)}
        if taps and self.names.spelling.as_peft:
            rows.add((1, out, *ones))
        if tensor.shape in rows:
            return self._read(tensor).reshape(out)
        message = f"'{tensor.name}' is {list(tensor.shape)}"
        if tensor.shape in {(into,), (1, into, *ones)}:
            hint = "peft's DoRA has one for each output"
            raise SurgeryError("PSG520", f"{message}: a magnitude for each input of '{name}'", hint)
        raise SurgeryError("PSG507", f"{message}, and the weight of '{name}' is {list(sizes)}")

    def parts(self, name: str) -> dict[str, Array]:
        """All that a module has but its alpha, in fp32. PSG505 for what are no finite numbers."""
        tensors = self.names.tensors[name]
        return {part: self._read(tensor) for part, tensor in tensors.items() if part != "alpha"}

    def any_has(self, part: str) -> bool:
        """Whether any module of the model has such a tensor."""
        own = (parts for name, parts in self.names.tensors.items() if self._is_own(name))
        return any(part in parts for parts in own)

    def _is_own(self, name: str) -> bool:
        return name.startswith((*self.beginnings,))

    def _factor(self, name: str, part: str) -> Array:
        tensor, spelling = self.names.tensors[name].get(part), self.names.spelling
        if tensor is None:
            raise SurgeryError("PSG507", f"'{name}' has no '{spelling.suffix(part)}'")
        value = self._read(tensor)
        return value.T if spelling.turned else value

    def _read(self, tensor: Tensor) -> Array:
        if tensor.dtype not in FLOATS:
            raise SurgeryError("PSG505", f"'{tensor.name}' holds {tensor.dtype}, which is no float")
        value = read_rows(self.names.file, tensor).astype(np.float32)
        if not np.isfinite(value).all():
            raise SurgeryError("PSG505", f"'{tensor.name}' holds NaN or infinity")
        return value

    def scale(self, name: str, path: str, rank: int) -> float:
        """What a module's product is multiplied by; 1 if nothing says it, as in the programs."""
        alpha, file = self.names.tensors[name].get("alpha"), self.names.file.path
        if alpha is not None and alpha.count != 1:
            raise SurgeryError("PSG507", f"'{alpha.name}' is {list(alpha.shape)}, and no number")
        if alpha is not None:
            return float(self._read(alpha).reshape(())) / rank
        if self._config is not None:
            return self._config
        if not self._metadata:
            return 1.0
        said, scale = layer_scales(file, self._metadata)(path)
        if said != rank:
            message = f"'{name}' is of rank {rank}, and the metadata of {file} say {said}"
            raise SurgeryError("PSG507", message)
        return scale

    @cached_property
    def _config(self) -> float | None:
        """The scale that a config beside the file says. PSG501, PSG503, PSG520."""
        words, folder = foreign_words()["config"], self.names.file.path.parent
        if not (folder / words["file"]).is_file():
            return None
        config = read_object(folder / words["file"], "PSG501")
        kind = config.get(words["kind"])
        if kind is None:
            return None
        if kind != words["plain"]:
            message = f"'{folder}' is no plain LoRA: its {words['kind']} is {brief(kind)}"
            raise SurgeryError("PSG520", message)
        settings = config.get(words["settings"])
        value: Any = settings.get(words["scale"]) if isinstance(settings, dict) else None
        if type(value) not in (int, float) or not math.isfinite(value):
            message = f"{folder / words['file']}: the scale cannot be {brief(value)}"
            raise SurgeryError("PSG503", message)
        return float(value)

    @cached_property
    def _metadata(self) -> Mapping[str, Any]:
        """What the file's metadata say of the model, in peft's keys. PSG503, PSG520."""
        key, file = foreign_words()["metadata"], self.names.file
        try:
            said = parse_object(file.metadata.get(key, "{}").encode())
        except ValueError as error:
            raise SurgeryError("PSG503", f"{file.path}: {key}: {error}") from None
        found = {
            name.removeprefix(beginning): value
            for beginning in self.beginnings
            for name, value in said.items()
            if name.startswith(beginning)
        }
        allowed = foreign_words()["with_magnitudes"] if self.any_has("magnitude") else ()
        plain = {key: value for key, value in found.items() if key not in allowed}
        for other in strangers({**plain, "peft_type": "LORA"}) if found else ():
            message = f"{file.path} is no plain LoRA: its {other} is {brief(found.get(other))}"
            raise SurgeryError("PSG520", message)
        return found
