"""Safetensors files: headers read with suspicion and written the same way every time.

A file is eight bytes that say how long the header is, the header (a JSON object: each tensor's
dtype, shape and place), and the tensors' bytes, one after the other without holes. What a header
may say is checked before anything is believed: whoever made it may have made it to be misread.
Format: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peftsurgery.errors import SurgeryError
from peftsurgery.files import parse_object, why_unread

MAX_HEADER = 100 * 2**20  # what the safetensors library itself takes
MAX_TENSORS = 2**18  # a thousand layers of 256 experts; each costs a reader a kilobyte

# Bits of one element, by the format's names.
BITS: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
        **dict.fromkeys(("F32", "I32", "U32"), 32),
        **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
        **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
        **dict.fromkeys(("I8", "U8", "BOOL"), 8),
        **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
        "F4": 4,
    }
)


@dataclass(frozen=True)
class Tensor:
    """One tensor of a header: ``start`` and ``end`` count bytes from where the header ends."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header was checked; ``offset`` is where its tensors begin."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    offset: int


def read_header(path: Path, code: str = "PSG207") -> TensorFile:
    """Read and check the header of a safetensors file.

    Raises SurgeryError with ``code`` for what is no regular file, for a header that is too long, no
    JSON object, holds a key twice or anything but tensors and texts, for names that are empty or
    hold NUL, for tensors that overlap, leave holes, do not fit their shape, or end before or after
    the file does.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO would wait
        with open(handle, "rb") as stream:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("it is no regular file")
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(found.st_size - 8, MAX_HEADER):
                raise ValueError("its header has no such length")
            content = parse_object(stream.read(length))
        return _checked(path, content, 8 + length, found.st_size)
    except (OSError, ValueError, RecursionError) as error:
        raise SurgeryError(code, why_unread(path, error)) from None


def header_of(tensors: Iterable[Tensor], metadata: Mapping[str, str]) -> bytes:
    """Header bytes for tensors in their order, padded to eight bytes; the same for the same input.

    Their places must follow one another; see :func:`laid_out`.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.start, tensor.end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def laid_out(described: Iterable[tuple[str, str, tuple[int, ...]]]) -> list[Tensor]:
    """Place tensors (name, dtype, shape) one after the other."""
    tensors, end = list[Tensor](), 0
    for name, dtype, shape in described:
        start, end = end, end + size_of(dtype, shape)
        tensors.append(Tensor(name, dtype, shape, start, end))
    return tensors


def size_of(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor. Raises ValueError for an unknown dtype or a part of a byte."""
    if dtype not in BITS:
        raise ValueError(f"no dtype is called {dtype!r:.40}")
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8:
        raise ValueError(f"{list(shape)} numbers of {BITS[dtype]} bits do not fill whole bytes")
    return bits // 8


def _checked(path: Path, content: dict[str, Any], offset: int, size: int) -> TensorFile:
    """The file that a header describes. ValueError if it cannot be so."""
    metadata = content.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # mlx writes null where it has none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are not texts")
    if len(content) > MAX_TENSORS:
        raise ValueError(f"it has more than {MAX_TENSORS} tensors")
    tensors = {name: _tensor(name, entry) for name, entry in content.items()}
    end = 0
    for tensor in sorted(tensors.values(), key=lambda each: (each.start, each.end)):
        if tensor.start != end:
            what = "overlaps another" if tensor.start < end else "has a hole before it"
            raise ValueError(f"'{tensor.name}' {what}")
        end = tensor.end
    if offset + end != size:
        raise ValueError(f"its tensors end at byte {offset + end}, and the file at {size}")
    return TensorFile(path, tensors, metadata, offset)


def _tensor(name: str, entry: Any) -> Tensor:
    """One entry of a header. ValueError if it describes no tensor."""
    if not name or "\0" in name:
        raise ValueError(f"{name!r:.40} is no name of a tensor")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"'{name}' has not just a dtype, a shape and offsets")
    dtype, shape, places = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(places):
        raise ValueError(f"'{name}' has a dtype, a shape or offsets that are none")
    if len(places) != 2 or len(shape) > 64 or math.prod(shape) >= 2**63:
        raise ValueError(f"'{name}' has a shape or offsets that no tensor has")
    if places[1] - places[0] != size_of(dtype, shape):
        raise ValueError(f"'{name}' has {places[1] - places[0]} bytes, which its shape has not")
    return Tensor(name, dtype, tuple(shape), *places)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)
