"""The files of weights of a streamed fold, written again by a thread for each processor.

Threads take tensors, not files: a model in one file is written as fast as one in many. Each but
one leaves its work to a process of its own (:mod:`.twin`) where there can be one. Where a tensor
lies is known before, so each is written to its place. What is written is hashed on its way
from the memory, and read once. Matrix products get no threads of their own meanwhile: those would
wait for each other, and take several times the processor's time.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Lock
from typing import Any

from threadpoolctl import threadpool_limits

from peftsurgery.checkpoint.arrays import FLOATS, as_bytes
from peftsurgery.checkpoint.codecs.coded import PlainView
from peftsurgery.checkpoint.copied_ahead import CopiedFile, copies_of, let_go
from peftsurgery.checkpoint.fold_tensor import Folding, FoldMeasure
from peftsurgery.checkpoint.hashing import ALGORITHM, hash_of, new_digest
from peftsurgery.checkpoint.part_file import PartFile
from peftsurgery.checkpoint.part_folder import PartFolder
from peftsurgery.checkpoint.tensor_bytes import chunks
from peftsurgery.checkpoint.twin import Twin, twins_for
from peftsurgery.tensor_file import Tensor, TensorFile, header_of, laid_out


@dataclass(frozen=True)
class Streamed:
    """A fold under way: what is read, the dtype that changed tensors get, who hears of progress."""

    folding: Folding
    view: PlainView
    dtype: str | None = None
    progress: Callable[[int], None] = field(default=lambda size: None, repr=False)

    def dtype_of(self, tensor: Tensor) -> str:
        """The dtype in which a tensor is written."""
        return self.dtype if self.dtype and tensor.dtype in FLOATS else tensor.dtype

    def write(self, tensors: Sequence[Tensor], into: PartFile, place: int) -> dict[str, Any]:
        """Write tensors, the first byte of whose file is at ``place``; what is said of each.

        They are one, or parts of one weight that is quantised again.
        """
        tensor = tensors[0]
        if tensor.name in self.view.again_by_part:
            return self._write_parts({each.name: each for each in tensors}, into, place)
        return {tensor.name: self._write_one(tensor, into, place + tensor.start)}

    def _write_parts(
        self, tensors: Mapping[str, Tensor], into: PartFile, start: int
    ) -> dict[str, Any]:
        """Write parts of a weight that is quantised again, band by band."""
        from peftsurgery.checkpoint.requantised import requantised  # which few bases need

        weight = self.view.coded[self.view.again_by_part[next(iter(tensors))]]
        names = {part: tensor.name for part, (_, tensor) in weight.parts.items()}
        digests, measure = {name: new_digest() for name in tensors}, FoldMeasure()
        apart = set[str]()
        for band in requantised(self.folding, weight.tensor.name, measure):
            name, content = names[band.part], as_bytes(band.values)
            if name not in tensors:
                continue
            tensor = tensors[name]
            rows = tensor.shape[0] if tensor.shape else 1
            row = tensor.size // max(1, rows)
            if band.axis:  # a piece of each row
                place = start + tensor.start + band.start * band.values.itemsize
                into.write_apart(content, len(content) // rows, place, row)
                apart.add(name)
            else:
                digests[name].update(content)
                into.write(content, start + tensor.start + band.start * row)
            self.progress(len(content))
        said = {}
        for name, tensor in tensors.items():
            for block in into.read(start + tensor.start, tensor.size) if name in apart else ():
                digests[name].update(block)
            before = hash_of(*self.view.held[name])
            own = measure if name == names["weight"] else FoldMeasure()
            said[name] = _account(digests[name].hexdigest(), before, own)
        return said

    def _write_one(self, tensor: Tensor, into: PartFile, place: int) -> dict[str, Any]:
        """Write a tensor from ``place`` of a file on; what the certificate says of it."""
        digest, before, measure = new_digest(), new_digest(), FoldMeasure()
        blocks: Iterable[memoryview]
        if self.is_kept(tensor):
            blocks, before = chunks(*self.view.held[tensor.name]), digest
        else:
            blocks = self.folding.blocks(tensor.name, tensor.dtype, measure, before.update)
        for block in blocks:
            digest.update(block)
            into.write(block, place)
            place += len(block)
            self.progress(len(block))
        if tensor.name in self.view.resized:
            for chunk in chunks(*self.view.held[tensor.name]):
                before.update(chunk)
        elif self.view.is_plain and tensor.name in self.view.coded:
            for each in self.view.coded[tensor.name].hashes.values():
                before.update(each.encode())
        return _account(digest.hexdigest(), before.hexdigest(), measure)

    def together(self, tensors: Iterable[Tensor]) -> list[tuple[Tensor, ...]]:
        """Tensors of a file as they are written: parts of a weight that is made again are one."""
        found: dict[tuple[str, bool], list[Tensor]] = {}
        for tensor in tensors:
            weight = self.view.again_by_part.get(tensor.name)
            key = (tensor.name, False) if weight is None else (weight, True)
            found.setdefault(key, []).append(tensor)
        return [tuple(group) for group in found.values()]

    def is_kept(self, tensor: Tensor) -> bool:
        """Whether a tensor of the result is the base's, byte for byte."""
        if self.view.is_plain and tensor.name in self.view.coded:
            return False
        same = tensor.dtype == self.view.held[tensor.name][1].dtype
        return same and tensor.name not in self.folding.plan.changed


class Shard:
    """One file of the base that is written again, its tensors in the same order."""

    def __init__(
        self,
        streamed: Streamed,
        into: PartFolder,
        file: TensorFile,
        copied: CopiedFile | None = None,
    ) -> None:
        """Lay the file out; ``into`` is where it is to be, and ``copied`` what is copied of it."""
        held = streamed.view.of(file)
        self.tensors = laid_out((each.name, streamed.dtype_of(each), each.shape) for each in held)
        self._header = header_of(self.tensors, file.metadata)
        self._streamed, self._into, self._name = streamed, into, file.path.name
        self._said: dict[str, Any] = {tensor.name: None for tensor in self.tensors}
        self._file: PartFile | None = None
        if copied is not None and copied.header == self._header:
            self._adopt(copied)
        left = (tensor for tensor in self.tensors if self._said[tensor.name] is None)
        self.parts: list[Sequence[Tensor]] = [(), *streamed.together(left)]
        self._left, self._lock = len(self.parts), Lock()
        self._begun_elsewhere: PartFile | None = None

    def _adopt(self, copied: CopiedFile) -> None:
        """Take over the tensors that were copied and stay as they are."""
        with suppress(OSError):  # the file is begun anew then
            self._file = self._into.adopted(copied.file)
            for tensor in self.tensors:
                found = copied.hashes.get(tensor.name)
                if found is not None and self._streamed.is_kept(tensor):
                    self._said[tensor.name] = _account(found, found, FoldMeasure())
                    self._streamed.progress(tensor.size)

    def write(self, number: int, beside: Callable[[], Any] | None = None) -> bool:
        """Write a part: the header, or tensors. Tells whether that was the last part.

        ``beside`` has tensors written by another process, and gives what is said of them.
        """
        with self._lock:
            if self._file is None:
                self._file = self._into.begun(self._name)
        part = self.parts[number]
        if not part:
            self._file.write(self._header, 0)
        elif beside is None:
            self._said |= self._streamed.write(part, self._file, len(self._header))
        else:
            self._said |= beside()
            self._streamed.progress(sum(tensor.size for tensor in part))
        with self._lock:
            self._left -= 1
            return not self._left

    def write_beside(self, number: int) -> dict[str, Any]:
        """Write tensors to the file that another process has begun; what is said of them."""
        if self._begun_elsewhere is None:
            self._begun_elsewhere = self._into.opened(self._name)
        unheard = replace(self._streamed, progress=lambda size: None)
        return unheard.write(self.parts[number], self._begun_elsewhere, len(self._header))

    def end(self) -> None:
        """Wait until the file is on the disk, and give it its name."""
        if self._file is not None:
            self._into.ended(self._file, self._said)

    def leave(self) -> None:
        """Close the file, whatever became of it."""
        if self._file is not None:
            self._file.stream.close()


class _Work:
    """Parts of files that are to be written, as threads take them.

    Each thread has a file of its own as long as there are enough: those that write one file wait
    for each other.
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._parts = {shard: deque(range(len(shard.parts))) for shard in shards}
        self._free, self._lock = deque(self._parts), Lock()

    def taken(self) -> Iterator[tuple[Shard, int]]:
        """The numbers of the parts that fall to one thread, one after the other."""
        mine: Shard | None = None
        while True:
            with self._lock:
                if mine is None or not self._parts.get(mine):
                    left = (shard for shard, parts in self._parts.items() if parts)
                    mine = self._free.popleft() if self._free else next(left, None)
                if mine is None:
                    return
                part = self._parts[mine].popleft()
            yield mine, part

    def drop(self) -> None:
        """Let no further part be taken."""
        with self._lock:
            self._free.clear()
            self._parts.clear()


def write_shards(streamed: Streamed, into: PartFolder, files: Iterable[TensorFile]) -> None:
    """Write files of the base again. The first error ends all of it.

    One thread more waits for the disk.
    """
    copies = copies_of(streamed.view.folder)
    shards = [Shard(streamed, into, file, copies.get(file.path.name)) for file in files]
    let_go(copies)
    work, count = _Work(shards), len(os.sched_getaffinity(0))
    alone, disk = threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(1)
    numbers = {shard: number for number, shard in enumerate(shards)}
    twins = twins_for(lambda task: shards[task[0]].write_beside(task[1]), count - 1)

    def write(twin: Twin | None) -> list[Future[None]]:
        ends: list[Future[None]] = []
        for shard, part in work.taken():
            beside = None if twin is None else partial(twin.done, (numbers[shard], part))
            if shard.write(part, beside):
                for end in ends[-1:]:
                    end.result()  # no more of a thread's files wait than one
                ends.append(disk.submit(shard.end))
            for end in ends[-1:]:
                if end.done():
                    end.result()  # a disk that is full is noticed before the next part
        return ends

    with alone, twins as others, disk, ThreadPoolExecutor(count) as pool:
        try:
            for run in as_completed([pool.submit(write, twin) for twin in (None, *others)]):
                for end in run.result():
                    end.result()
        except BaseException:
            work.drop()
            raise
        finally:
            pool.shutdown()
            disk.shutdown()
            for shard in shards:
                shard.leave()


def _account(written: str, before: str, measure: FoldMeasure) -> dict[str, Any]:
    """What the certificate says of a tensor, by its hashes; of one that is the base's, its own."""
    said: dict[str, Any] = {ALGORITHM: written}
    if written != before:
        said["base"] = before
    if measure.elements and (written != before or measure.is_quantised):
        said["change"] = measure.to_dict()
    return said
