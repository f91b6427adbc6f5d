"""Bytes of the tensors in safetensors files, and of other files, read without numpy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from peftsurgery.stand_ins import stand_in_of
from peftsurgery.tensor_file import Tensor, TensorFile

CHUNK = 2**20  # bytes that are read at once, to be copied or hashed


def read_bytes(file: TensorFile, tensor: Tensor, start: int, size: int) -> bytearray:
    """Bytes of a tensor, from its byte ``start`` on. Raises EOFError if the file has shrunk."""
    content = bytearray(size)
    read_into(memoryview(content), file, tensor, start)
    return content


def read_into(room: memoryview, file: TensorFile, tensor: Tensor, start: int) -> None:
    """Read bytes of a tensor, from its byte ``start`` on, as many as there is room for.

    Raises EOFError if the file has shrunk.
    """
    with FileIO(file.path) as stream:
        _fill(file.path, stream, room, file.offset + tensor.start + start)


def chunks(file: TensorFile, tensor: Tensor) -> Iterator[memoryview]:
    """All bytes of a tensor, :data:`CHUNK` at a time, each in the memory of the one before.

    Raises EOFError if the file has shrunk.
    """
    room = memoryview(bytearray(min(CHUNK, tensor.size)))
    with FileIO(file.path) as stream:
        for start in range(0, tensor.size, CHUNK):
            part = room[: tensor.size - start]
            _fill(file.path, stream, part, file.offset + tensor.start + start)
            yield part


def file_chunks(path: Path) -> Iterator[bytes]:
    """All bytes of a file, :data:`CHUNK` at a time."""
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


def _fill(path: Path, stream: FileIO, room: memoryview, place: int) -> None:
    """Read from a place of a file on, until there is no more room."""
    apart = stand_in_of(path)
    if apart is not None:
        apart.fill(path.name, room, place)
        return
    fill(stream, room, place)


def fill(stream: FileIO, room: memoryview, place: int) -> None:
    """Read from a place of a file that is here on. Raises EOFError if the file has shrunk."""
    while room:
        got = os.preadv(stream.fileno(), [room], place)
        if not got:
            raise EOFError(f"{stream.name} has become shorter")
        room, place = room[got:], place + got
