"""Tensors that are copied before a fold is planned, since most of a model stays as it is.

While a command still imports what it computes with and reads the adapter, a process of its own
(a thread would wait for Python's lock most of the time) copies tensors of the base that the adapter
has nothing for, going by their names. The copies have no name on the disk (O_TMPFILE): whatever
ends the processes, they are gone. They get one only from a fold that was planned and checked and
would write the same bytes to the same places; else they are dropped, and the fold does all itself.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from peftsurgery.checkpoint.hashing import new_digest
from peftsurgery.checkpoint.part_file import PartFile
from peftsurgery.checkpoint.tensor_bytes import chunks
from peftsurgery.errors import SurgeryError
from peftsurgery.model_files import weight_names
from peftsurgery.tensor_file import Tensor, TensorFile, header_of, laid_out, read_header

MOST = 64  # files, each of which is open until the fold takes it
PLAIN = {"F64", "F32", "F16", "BF16"}  # a base with others may be quantised, and written anew


@dataclass(frozen=True)
class CopiedFile:
    """A file of weights with some of its tensors in place, and the hashes of those by name.

    ``header`` is what the file begins with if it is laid out as the copies are.
    """

    header: bytes
    file: PartFile
    hashes: Mapping[str, str]


class CopyAhead:
    """Copies of a base's tensors, made by a process that ends when it is told to, or with this one.

    It is forked: nothing that has threads, as numpy and torch have, should be imported yet.
    """

    def __init__(self, base: Path, adapter: Path, room: Path) -> None:
        """``room`` is a directory on the disk on which the result will be. OSError if refused."""
        flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
        self._files: dict[str, PartFile] = {}
        for name in weight_names(base)[:MOST]:
            handle = os.open(room, flags, 0o666)
            self._files[name] = PartFile(name, FileIO(handle, "r+"))
        told, self._tell = os.pipe()
        self._answer, answer = os.pipe()
        self._process = os.fork()
        if not self._process:
            try:
                os.close(self._tell)
                _Copying(told, self._files).run(base, adapter, answer)
            finally:
                os._exit(0)
        os.close(told)
        os.close(answer)

    def taken(self) -> Mapping[str, CopiedFile]:
        """Stop, and give what was copied by the names of files; it is the taker's to close."""
        os.close(self._tell)
        with os.fdopen(self._answer, "rb") as stream:
            content = stream.read()
        said = json.loads(content or b"{}")
        for name, file in self._files.items():
            if name not in said:
                file.stream.close()
        return {
            name: CopiedFile(bytes.fromhex(header), self._files[name], hashes)
            for name, (header, hashes) in said.items()
        }

    def end(self) -> None:
        """Wait for the process, which may still flush what it has told of."""
        os.waitpid(self._process, 0)


class _Copying:
    """What the process does that copies."""

    def __init__(self, told: int, files: Mapping[str, PartFile]) -> None:
        """``told`` is read to its end once copies are not wanted any further."""
        os.set_blocking(told, False)
        self._told, self._files = told, files
        self._said: dict[str, tuple[str, dict[str, str]]] = {}

    def run(self, base: Path, adapter: Path, answer: int) -> None:
        """Copy until all is copied, or something is in the way: the fold will say what."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the process that began it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with suppress(OSError, EOFError, SurgeryError):
            meant = _meant_by(adapter)
            for name, into in self._files.items() if meant else ():
                file = read_header(base / name)
                if {tensor.dtype for tensor in file.tensors.values()} <= PLAIN:
                    self._copy(file, into, meant)
        with os.fdopen(answer, "wb") as stream:
            stream.write(json.dumps(self._said).encode())

    def _is_wanted(self) -> bool:
        try:
            return bool(os.read(self._told, 1))
        except BlockingIOError:
            return True

    def _copy(self, file: TensorFile, into: PartFile, meant: set[str]) -> None:
        """Copy the tensors of a file that the adapter does not mean."""
        if not self._is_wanted():
            return
        held = sorted(file.tensors.values(), key=lambda tensor: tensor.start)
        placed = laid_out((tensor.name, tensor.dtype, tensor.shape) for tensor in held)
        header, hashes = header_of(placed, file.metadata), dict[str, str]()
        self._said[into.name] = header.hex(), hashes
        for tensor, place in zip(held, placed, strict=True):
            if tensor.name.removesuffix(".weight") not in meant:
                found = self._copied(file, tensor, into, len(header) + place.start)
                if found is None:
                    return
                hashes[tensor.name] = found

    def _copied(self, file: TensorFile, tensor: Tensor, into: PartFile, place: int) -> str | None:
        """Copy a tensor and give the hash of its bytes; None if it is not wanted any further."""
        digest = new_digest()
        for chunk in chunks(file, tensor):
            if not self._is_wanted():
                return None
            digest.update(chunk)
            into.write(chunk, place)
            place += len(chunk)
        return digest.hexdigest()


_UNDER_WAY: dict[Path, CopyAhead] = {}


@contextmanager
def copying_ahead(base: Path, adapter: Path, room: Path) -> Iterator[None]:
    """Copy tensors of a base while the block runs, until a fold of that base takes the copies."""
    key, ahead = base.resolve(), None
    with suppress(OSError, SurgeryError):  # the fold will say what is wrong
        ahead = _UNDER_WAY[key] = CopyAhead(base, adapter, room)
    try:
        yield
    finally:
        let_go(copies_of(key))
        if ahead is not None:
            ahead.end()


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
