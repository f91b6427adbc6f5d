"""What a fold of files will take, told from headers alone: nothing is read of any tensor."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftsurgery.checkpoint.arrays import FLOATS
from peftsurgery.checkpoint.codecs.coded import CodedWeight, PlainView
from peftsurgery.checkpoint.fold_site import BLOCK, STACK, is_by_lines, is_by_rows
from peftsurgery.checkpoint.plan import FoldPlan, Planned
from peftsurgery.checkpoint.ties import view_of
from peftsurgery.model_files import INDEX, ModelFiles, other_files, read_model_files
from peftsurgery.stand_ins import called
from peftsurgery.tensor_file import BITS, Tensor

FIXED = 90 * 2**20  # bytes of the interpreter with what a fold imports
APART = 90 * 2**20  # what reads and writes elsewhere, with what it holds of files
COPIES = 9  # arrays in fp32, of the elements that are computed at once, that are there together


@dataclass(frozen=True)
class FoldEstimate:
    """What a fold will take, in bytes, and the tensors that it changes.

    ``read`` and ``write`` are of all files, ``fold`` of the tensors that change; ``memory`` is the
    peak of the process; ``disk`` what the output needs at most, of which ``free`` is there.
    """

    base: str
    changed: int
    tensors: int
    files: int
    read: int
    write: int
    fold: int
    memory: int
    disk: int
    free: int

    def to_dict(self) -> dict[str, Any]:
        """The estimate as ``--json`` prints it."""
        return {**asdict(self), "dry_run": True}

    def __str__(self) -> str:
        what = f"{self.changed} of {self.tensors} tensors, in {self.files} files"
        lines = [
            f"would change {what} of '{self.base}'",
            f"  read {gigabytes(self.read)}, write {gigabytes(self.write)}, of which "
            f"{gigabytes(self.fold)} are computed",
            f"  memory: about {self.memory / 2**20:.0f} MiB",
            f"  disk: {gigabytes(self.disk)} needed, {gigabytes(self.free)} free",
        ]
        return "\n".join(lines)


def estimate(
    planned: Planned,
    out: Path,
    dtype: str | None = None,
    reversible: bool = False,
    requantise: bool = False,
    spooled: bool = False,
) -> FoldEstimate:
    """Estimate what carrying out a plan takes; the options are those of the fold.

    Of an output that is ``spooled``, each thread has two files here, the second until it is sent.
    """
    files, plan, name = read_model_files(planned.base), planned.plan, called(planned.base)
    view = view_of(plan, files, requantise)
    tensors = {name: tensor for name, (_, tensor) in view.tensors.items()}
    changed = [tensors[name] for name in plan.changed]
    size = sum(tensor.size for file in files.files for tensor in file.tensors.values())
    fold = sum(tensor.size for tensor in changed)
    sizes = [sum(_written(each, dtype) for each in view.of(file)) for file in files.files]
    others = _others(plan, files)
    write = sum(sizes) + others
    most = sorted(sizes)[-2 * len(os.sched_getaffinity(0)) :]
    learnt = sum(tensor.size for tensor in planned.adapter.tensors.values())
    return FoldEstimate(
        base=name,
        changed=len(changed),
        tensors=len(tensors),
        files=len(files.files),
        read=size + learnt,
        write=write,
        fold=fold,
        memory=FIXED
        + _working(plan, view)
        + (APART if spooled or name != str(planned.base) else 0),
        disk=sum(most) + others if spooled else write + (fold if reversible else 0),
        free=shutil.disk_usage(out.absolute().parent).free,
    )


def gigabytes(count: int) -> str:
    """A number of bytes as it is read."""
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def _written(tensor: Tensor, dtype: str | None) -> int:
    """Bytes that a tensor has in the output."""
    return tensor.count * BITS[dtype] // 8 if dtype and tensor.dtype in FLOATS else tensor.size


def _others(plan: FoldPlan, files: ModelFiles) -> int:
    """Bytes of headers, of the index and of the files that hold no weights."""
    kept = other_files(files.folder).items()
    sizes = {name: path.stat().st_size for name, path in kept if name not in plan.without}
    sizes |= {name: len(content) for name, content in plan.files.items()}
    index = 0 if files.index is None else (files.folder / INDEX).stat().st_size
    return sum(sizes.values()) + sum(file.offset for file in files.files) + index


def _working(plan: FoldPlan, view: PlainView) -> int:
    """Bytes of memory for what is computed at once, in all threads together."""
    held = {name: tensor for name, (_, tensor) in view.tensors.items()}
    sizes = [_in_bands(weight) for weight in view.coded.values()]
    for site in plan.sites:
        mine = [held[each] for name in site.weights.values() for each in _first(plan, name)]
        dims = max(len(tensor.shape) for tensor in mine)
        in_pieces = not plan.stacks.keys().isdisjoint(site.weights.values())
        if is_by_lines(site) and (in_pieces or dims == STACK):
            sizes.append(BLOCK)
        else:
            sizes.append(_at_once(mine, is_by_rows(site, dims) and not in_pieces))
    replaced = (held[each] for name in plan.replaced for each in _first(plan, name))
    sizes += [_at_once([tensor], True) for tensor in replaced]
    threads = len(os.sched_getaffinity(0))
    return sum(sorted(sizes)[-threads:]) * 4 * COPIES


def _in_bands(weight: CodedWeight) -> int:
    """How many elements of a weight are decoded, or quantised again, at once."""
    count, bands = weight.tensor.count, weight.bands
    if bands is None or bands.is_closed:
        return count
    return min(count, max(BLOCK, bands.rows * (count // max(1, weight.tensor.shape[0]))))


def _first(plan: FoldPlan, name: str) -> list[str]:
    """The tensors that are read together for a weight: of a stack in pieces, one expert's."""
    pieces = plan.stacks.get(name, ((name, 0, 0, 0),))
    return [piece for piece, expert, *_ in pieces if expert == 0]


def _at_once(tensors: Sequence[Tensor], by_rows: bool) -> int:
    """How many elements of weights that are folded together are computed at once."""
    count = sum(tensor.count for tensor in tensors)
    rows = max(tensor.count // max(1, *tensor.shape[:1]) for tensor in tensors)
    return min(count, max(BLOCK, rows)) if by_rows else count
