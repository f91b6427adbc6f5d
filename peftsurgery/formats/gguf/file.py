"""GGUF files, version 3: a header of keys and tensors' places, then the tensors, aligned.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from peftsurgery.checkpoint.arrays import Array

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
F32, FLOAT, STRING = 0, 6, 8  # a tensor's type, and two types of keys


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to be written, in fp32; its values are made when it is its turn."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], Array]


def gguf_bytes(keys: Mapping[str, str | float], tensors: list[GgufTensor]) -> Iterator[bytes]:
    """The content of a file, block by block."""
    header = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(keys))
    for key, value in keys.items():
        is_text = isinstance(value, str)
        content = _text(value) if isinstance(value, str) else struct.pack("<f", value)
        header += _text(key) + struct.pack("<I", STRING if is_text else FLOAT) + content
    place = 0
    for tensor in tensors:
        sizes = tensor.shape[::-1]  # the fastest one first
        header += _text(tensor.name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        header += struct.pack("<IQ", F32, place)
        place += _aligned(4 * int(np.prod(tensor.shape)))
    yield header + b"\0" * (_aligned(len(header)) - len(header))
    for tensor in tensors:
        values = np.ascontiguousarray(tensor.values(), "<f4")
        assert values.shape == tensor.shape
        content = values.tobytes()
        yield content + b"\0" * (_aligned(len(content)) - len(content))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(value: str) -> bytes:
    content = value.encode()
    return struct.pack("<Q", len(content)) + content
