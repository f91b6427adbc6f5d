"""Safetensors files as they lie on the disk: which tensors, and where their bytes are.

Only headers are read here, and single blocks of bytes by their offset; nothing is mapped, so that a
few samples of a large file cost a few reads.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftsurgery.errors import SurgeryError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_HEADER = 100 * 2**20  # what the safetensors library itself takes


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
    try:
        if not file.is_file():  # opening a FIFO may never return
            raise ValueError("it is no regular file")
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= min(size - 8, _LARGEST_HEADER):
                raise ValueError("its header has no such length")
            entries = json.loads(stream.read(length))
        if not isinstance(entries, dict):
            raise ValueError("its header is no JSON object")
        found = {n: _entry(file, e, 8 + length) for n, e in entries.items() if n != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(file, error, code) from None
    for name, tensor in found.items():
        if tensor.start + tensor.size > size:
            raise _damaged(file, f"'{name}' ends after the file does", code)
    return found


def _entry(file: Path, entry: Mapping[str, Any], offset: int) -> StoredTensor:
    shape = tuple(int(size) for size in entry["shape"])
    start, end = (int(each) for each in entry["data_offsets"])
    if not 0 <= start <= end or any(size < 0 for size in shape):
        raise ValueError("a tensor has a negative size")
    return StoredTensor(file, str(entry["dtype"]), shape, offset + start, end - start)


def _index(file: Path) -> dict[str, str]:
    """The shard of every tensor, as an index says. PSG207."""
    try:
        found = json.loads(file.read_bytes())["weight_map"]
        where = {str(name): str(shard) for name, shard in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(file, error) from None
    for shard in where.values():
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise _damaged(file, f"'{shard}' points out of the directory")
    return where


def _damaged(file: Path, why: object, code: str = "PSG207") -> SurgeryError:
    return SurgeryError(code, f"no weights could be read from {file}: {why}")
