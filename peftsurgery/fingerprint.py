"""Fingerprints of weights: by which a base is known again.

A fingerprint has, for every tensor by the name that the model's files give it, the dtype, the shape
and a hash of its bytes. Small tensors are hashed whole. Of one with more than 65,536 elements only
32 blocks of 256 elements are, spread evenly from the first element to the last: a base of 70B costs
some megabytes of reading, and a change that lies wholly between the blocks is not seen. Another
checkpoint, a fine-tuned or a merged one, differs nearly everywhere.

    "model.norm.weight": "BF16[4096] 0b9d8ac3a9f6e5d1b4f8a1c2d3e4f506"

The blocks are counted in elements, so that values can be compared after a cast.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peftsurgery.errors import SurgeryError
from peftsurgery.model_files import are_here, read_model_files
from peftsurgery.stand_ins import stand_in_of
from peftsurgery.tensor_file import Tensor as StoredTensor
from peftsurgery.tensor_file import TensorFile, read_header

ALGORITHM = "blake2b-128"
WHOLE, BLOCKS, BLOCK = 65_536, 32, 256
SAMPLING = f"tensors of more than {WHOLE} elements: {BLOCKS} even blocks of {BLOCK} elements"

Spans = Sequence[tuple[int, int]]
_LINE = re.compile(r"(\w+)\[([\d,]*)\] ([0-9a-f]{32})")


@dataclass(frozen=True)
class TensorPrint:
    """Name-independent record of one tensor: dtype, shape and sampled hash."""

    dtype: str
    shape: tuple[int, ...]
    content: str

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}] {self.content}"

    @staticmethod
    def parse(text: Any) -> TensorPrint:
        """Read a print from its text form. Raises ValueError for any other text."""
        found = _LINE.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ValueError(f"{text!r:.60} is no tensor's fingerprint")
        dtype, sizes, content = found.groups()
        return TensorPrint(dtype, tuple(int(size) for size in sizes.split(",") if size), content)


@dataclass(frozen=True)
class Fingerprint:
    """The prints of a base's tensors by name; ``live`` if they were a module's in memory."""

    tensors: Mapping[str, TensorPrint]
    live: bool = False

    @cached_property
    def digest(self) -> str:
        """One hash over all tensor prints, for display and quick comparison."""
        lines = "\n".join(f"{name} {self.tensors[name]}" for name in sorted(self.tensors))
        return hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()

    def summary(self) -> dict[str, Any]:
        """The fingerprint without its table."""
        return {
            "digest": self.digest,
            "of": "module" if self.live else "files",
            "algorithm": ALGORITHM,
            "sampled": SAMPLING,
        }

    def to_dict(self) -> dict[str, Any]:
        """The fingerprint as a manifest holds it."""
        tensors = {name: str(each) for name, each in self.tensors.items()}
        return {**self.summary(), "tensors": tensors}

    @staticmethod
    def parse(data: Any) -> Fingerprint | None:
        """Read what :meth:`to_dict` wrote; None if another algorithm made it.

        Raises ValueError if malformed.
        """
        if not isinstance(data, dict) or not isinstance(data.get("tensors"), dict):
            raise ValueError("the fingerprint is no table of tensors")
        if (data.get("algorithm"), data.get("sampled")) != (ALGORITHM, SAMPLING):
            return None
        tensors = {name: TensorPrint.parse(text) for name, text in data["tensors"].items()}
        return Fingerprint(tensors, data.get("of") == "module")


@dataclass(frozen=True)
class Sampled:
    """A tensor where it is, in a file or in memory: ``read`` gives the bytes of some elements.

    ``read_into`` puts them into memory that is there already, where that is quicker.
    """

    dtype: str
    shape: tuple[int, ...]
    count: int
    read: Callable[[Spans], bytes]
    read_into: Callable[[Spans, memoryview], None] | None = None

    def print(self) -> TensorPrint:
        """Print of the tensor."""
        content = self.read(spans(self.count))
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        return TensorPrint(self.dtype, self.shape, digest)


def content_digest(tensors: Iterable[Sampled]) -> str:
    """Hash of the contents of tensors, independent of names, that identifies a trained adapter."""
    lines = sorted(str(tensor.print()) for tensor in tensors)
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def spans(count: int) -> list[tuple[int, int]]:
    """Sampled element ranges of a tensor with so many elements: (first, end) of each block."""
    if count <= WHOLE:
        return [(0, count)]
    starts = [(count - BLOCK) * k // (BLOCKS - 1) for k in range(BLOCKS)]
    return [(start, start + BLOCK) for start in starts]


def in_folder(folder: Path) -> dict[str, Sampled]:
    """The tensors of a model's directory by name, from the files that transformers would read.

    Nothing if the weights are not there, or not all of them. PSG207 for files that are damaged.
    """
    if not are_here(folder):
        return {}
    files = read_model_files(folder)
    held = files.tensors
    names = held if files.index is None else files.index["weight_map"]
    return {name: on_disk(*held[name]) for name in names}


def in_file(path: Path) -> dict[str, Sampled]:
    """The tensors of one safetensors file by name. PSG207 if it is damaged."""
    file = read_header(path)
    return {name: on_disk(file, tensor) for name, tensor in file.tensors.items()}


def on_disk(file: TensorFile, tensor: StoredTensor) -> Sampled:
    """A tensor in a file, of which no more than blocks is read: nothing is mapped."""
    # elements of less than a byte each cannot be read one by one: bytes are counted instead
    is_whole = tensor.count and tensor.size % tensor.count == 0
    count = tensor.count if is_whole else tensor.size
    width = tensor.size // max(count, 1)

    def read_into(chosen: Spans, room: memoryview) -> None:
        apart, start = stand_in_of(file.path), file.offset + tensor.start
        if apart is not None:
            ranges = [(file.path.name, start + i * width, start + j * width) for i, j in chosen]
            content = b"".join(apart.read(ranges))
            room[: len(content)] = content
            return
        handle = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for first, end in chosen:
                part, room = room[: (end - first) * width], room[(end - first) * width :]
                _fill(part, handle, start + first * width)
        finally:
            os.close(handle)

    def read(chosen: Spans) -> bytes:
        room = bytearray(sum(end - first for first, end in chosen) * width)
        read_into(chosen, memoryview(room))
        return bytes(room)

    return Sampled(tensor.dtype, tensor.shape, count, read, read_into)


def _fill(room: memoryview, file: int, place: int) -> None:
    """Read from a place of a file on until ``room`` is full. PSG207 if the file ends before."""
    while room:
        count = os.preadv(file, [room], place)
        if not count:
            raise SurgeryError("PSG207", "a file of weights was cut short while it was read")
        room, place = room[count:], place + count
