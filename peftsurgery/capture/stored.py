"""Safetensors files as they lie on the disk: which tensors, and where their bytes are.

Only headers are read here, and single blocks of bytes by their offset; nothing is mapped, so that a
few samples of a large file cost a few reads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from peftsurgery.errors import SurgeryError
from peftsurgery.files import read_object
from peftsurgery.tensor_file import read_header

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: ``size`` bytes from ``start`` on; ``dtype`` as the format calls it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def count(self) -> int:
        """The number of elements; that of bytes, if elements are less than a byte each."""
        elements = math.prod(self.shape)
        return elements if elements and self.size % elements == 0 else self.size

    def read(self, spans: Iterable[tuple[int, int]]) -> bytes:
        """The bytes of these spans of elements, (first, end) each, one after the other."""
        width = self.size // max(self.count, 1)
        with self.file.open("rb", buffering=0) as file:
            parts = [
                os.pread(file.fileno(), (end - first) * width, self.start + first * width)
                for first, end in spans
            ]
        return b"".join(parts)


def tensors_in(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model's directory by name, from the files that transformers would read.

    Nothing if the weights are not there, or not all of them. PSG207 for a file that is damaged, and
    for an index that points out of the directory.
    """
    if (folder / WEIGHTS).is_file():
        return header_of(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        return {}
    where = _index(folder / INDEX)
    if not all((folder / shard).is_file() for shard in set(where.values())):
        return {}
    headers = {shard: header_of(folder / shard) for shard in sorted(set(where.values()))}
    for name, shard in where.items():
        if name not in headers[shard]:
            raise _damaged(folder / INDEX, f"'{name}' is not in {shard}")
    return {name: headers[shard][name] for name, shard in where.items()}


def header_of(file: Path, code: str = "PSG207") -> dict[str, StoredTensor]:
    """The tensors of one file by name; refused with ``code`` if it is damaged."""
    found = read_header(file, code)
    return {
        name: StoredTensor(file, each.dtype, each.shape, found.offset + each.start, each.size)
        for name, each in found.tensors.items()
    }


def _index(file: Path) -> dict[str, str]:
    """The shard of every tensor, as an index says. PSG207."""
    where = read_object(file, "PSG207").get("weight_map")
    if not isinstance(where, dict):
        raise _damaged(file, "it has no 'weight_map'")
    for name, shard in where.items():
        if not isinstance(shard, str) or Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise _damaged(file, f"'{name}' is in {shard!r:.80}, which is no file of the directory")
    return where


def _damaged(file: Path, why: str) -> SurgeryError:
    return SurgeryError("PSG207", f"no weights could be read from {file}: {why}")
