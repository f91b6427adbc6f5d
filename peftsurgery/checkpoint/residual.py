"""Residuals: what takes a folded tensor back to the base's, bit for bit.

A residual is the exclusive or of the bytes before and after, so it is exact whatever the dtype and
whatever was rounded. A fold moves a number by little: most bits of its exponent and sign stay, and
their bytes, put beside one another, are mostly zero and compress well. The bytes of a tensor are
taken in chunks, each: its compressed length in four bytes, then zlib's stream of its byte planes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from peftsurgery.checkpoint.tensor_bytes import read_bytes
from peftsurgery.errors import SurgeryError
from peftsurgery.files import check_regular
from peftsurgery.tensor_file import BITS, Tensor, TensorFile

CHUNK = 2**20  # bytes of a tensor; all but the last of its chunks have as many
RESIDUAL = ".residual"  # after the name of the file that it is beside
LEVEL = 3  # higher levels of zlib take several times as long for some hundredths of the size


def residual_of(
    before: TensorFile, after: TensorFile, names: Iterable[str], starts: dict[str, int]
) -> Iterator[bytes]:
    """Yield the residual of some tensors of a file, chunk by chunk.

    ``starts`` gets the byte at which that of each begins. Both files hold them in the same dtype.
    """
    end = 0
    for name in names:
        old, new = before.tensors[name], after.tensors[name]
        starts[name] = end
        for first in range(0, old.size, CHUNK):
            size = min(CHUNK, old.size - first)
            pair = read_bytes(before, old, first, size), read_bytes(after, new, first, size)
            chunk = packed(*pair, width_of(old))
            end += len(chunk)
            yield chunk


def packed(before: bytes | bytearray, after: bytes | bytearray, width: int) -> bytes:
    """One chunk of a residual; ``width`` is the size of an element in bytes."""
    gap = np.bitwise_xor(np.frombuffer(before, np.uint8), np.frombuffer(after, np.uint8))
    planes = zlib.compress(gap.reshape(-1, width).T.tobytes(), LEVEL)
    return struct.pack("<I", len(planes)) + planes


def unpacked(chunk: bytes, after: bytes, width: int) -> bytes:
    """The bytes before, from those after and a chunk of the residual (without its length).

    Raises ValueError for a chunk that is damaged, or is one of other bytes.
    """
    inflate = zlib.decompressobj()
    try:
        planes = inflate.decompress(chunk, len(after))
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(planes) != len(after) or not inflate.eof:
        raise ValueError("it has another length")
    gap = np.frombuffer(planes, np.uint8).reshape(width, -1).T.reshape(-1)
    return np.bitwise_xor(gap, np.frombuffer(after, np.uint8)).tobytes()


def chunks_of(path: Path, start: int, tensor: Tensor) -> Iterator[tuple[int, int, bytes]]:
    """Yield each chunk of a tensor's residual in a file: its first byte in the tensor, its size.

    Raises SurgeryError PSG417 for a file that ends before.
    """
    try:
        check_regular(path)
        with path.open("rb") as stream:
            stream.seek(start)
            for first in range(0, tensor.size, CHUNK):
                (length,) = struct.unpack("<I", stream.read(4))
                chunk = stream.read(min(length, 2 * CHUNK))
                yield first, min(CHUNK, tensor.size - first), chunk
    except (OSError, ValueError, struct.error) as error:  # NUL in a name is a ValueError
        raise SurgeryError("PSG417", f"'{path}' is not what was written: {error}") from None


def width_of(tensor: Tensor) -> int:
    """Bytes of an element."""
    return max(BITS[tensor.dtype] // 8, 1)
