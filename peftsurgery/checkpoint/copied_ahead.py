"""Tensors that are copied before a fold is planned, since most of a model stays as it is.

While a command still imports what it computes with and reads the adapter, a thread copies tensors
of the base that the adapter has nothing for, going by their names. The copies have no name on the
disk (O_TMPFILE): whatever ends the process, they are gone with it. They get one only from a fold
that was planned and checked and would write the same bytes to the same places; else they are
dropped, and the fold does all by itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from threading import Event, Thread

from peftsurgery.checkpoint.hashing import new_digest
from peftsurgery.checkpoint.part_folder import PartFile
from peftsurgery.errors import SurgeryError
from peftsurgery.model_files import weight_names
from peftsurgery.tensor_file import Tensor, TensorFile, header_of, laid_out, read_header

PIECE = 2**24  # bytes that are copied, and hashed, without asking whether that is still wanted
MOST = 64  # files, each of which is open until the fold takes it
PLAIN = {"F64", "F32", "F16", "BF16"}  # a base with others may be quantised, and written anew


@dataclass(frozen=True)
class CopiedFile:
    """A file of weights with some of its tensors in place, and the hashes of those by name.

    ``header`` is what the file begins with if it is laid out as the copies are.
    """

    header: bytes
    file: PartFile
    hashes: dict[str, str] = field(default_factory=dict)


class CopyAhead:
    """Copies of a base's tensors, which a thread makes until it is told to stop."""

    def __init__(self, base: Path, adapter: Path, room: Path) -> None:
        """``room`` is a directory on the disk on which the result will be."""
        self._base, self._adapter, self._room = base, adapter, room
        self._files: dict[str, CopiedFile] = {}
        self._space = bytearray(PIECE)
        self._stopped = Event()
        self._thread = Thread(target=self._run, name="copying ahead", daemon=True)
        self._thread.start()

    def taken(self) -> Mapping[str, CopiedFile]:
        """Stop, and give what was copied by the names of files; it is the taker's to close."""
        self._stopped.set()
        self._thread.join()
        taken, self._files = self._files, {}
        return taken

    def _run(self) -> None:
        """Copy until all is copied, or something is in the way: the fold will say what."""
        with suppress(OSError, SurgeryError):
            meant = _meant_by(self._adapter)
            for name in weight_names(self._base)[:MOST] if meant else ():
                file = read_header(self._base / name)
                if {tensor.dtype for tensor in file.tensors.values()} <= PLAIN:
                    self._copy(file, meant)

    def _copy(self, file: TensorFile, meant: set[str]) -> None:
        """Copy the tensors of a file that the adapter does not mean."""
        if self._stopped.is_set():
            return
        held = sorted(file.tensors.values(), key=lambda tensor: tensor.start)
        placed = laid_out((tensor.name, tensor.dtype, tensor.shape) for tensor in held)
        flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
        into = PartFile(file.path.name, FileIO(os.open(self._room, flags, 0o666), "r+"))
        copied = CopiedFile(header_of(placed, file.metadata), into)
        self._files[into.name] = copied
        with FileIO(file.path) as stream:
            for tensor, place in zip(held, placed, strict=True):
                if tensor.name.removesuffix(".weight") in meant:
                    continue
                starts = file.offset + tensor.start, len(copied.header) + place.start
                found = self._copied(stream, into, *starts, tensor)
                if found is None:
                    return
                copied.hashes[tensor.name] = found

    def _copied(
        self, stream: FileIO, into: PartFile, start: int, place: int, tensor: Tensor
    ) -> str | None:
        """Copy a tensor and give the hash of what is there then; None if it is told to stop."""
        digest, room = new_digest(), memoryview(self._space)
        for done in range(0, tensor.size, PIECE):
            if self._stopped.is_set():
                return None
            piece = room[: tensor.size - done]
            into.copy(stream, start + done, len(piece), place + done)
            into.read_into(piece, place + done)
            digest.update(piece)
        return digest.hexdigest()


_UNDER_WAY: dict[Path, CopyAhead] = {}


@contextmanager
def copying_ahead(base: Path, adapter: Path, room: Path) -> Iterator[None]:
    """Copy tensors of a base while the block runs, until a fold of that base takes the copies."""
    key = base.resolve()
    _UNDER_WAY[key] = CopyAhead(base, adapter, room)
    try:
        yield
    finally:
        let_go(copies_of(key))


def copies_of(base: Path) -> Mapping[str, CopiedFile]:
    """What was copied of a base; none of it is copied any further. The taker closes the files."""
    found = _UNDER_WAY.pop(base.resolve(), None) if _UNDER_WAY else None
    return {} if found is None else found.taken()


def let_go(copies: Mapping[str, CopiedFile]) -> None:
    """Let go of copies: those that have no name are gone then."""
    for copied in copies.values():
        copied.file.stream.close()


def _meant_by(adapter: Path) -> set[str]:
    """The paths of modules that an adapter's tensors are named after, among other parts of names.

    A few words may stand before such a path, and after it.

    Nothing for an adapter whose tensors have no names that can be read.
    """
    found = set[str]()
    for path in sorted(adapter.glob("*.safetensors")):
        for name in read_header(path).tensors:
            words = name.split(".")
            ends = range(len(words))[-4:]
            found |= {".".join(words[start:end]) for end in ends for start in range(min(end, 4))}
    return found
