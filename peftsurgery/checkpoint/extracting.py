"""An adapter from two checkpoints: the difference of each weight, taken apart at a low rank.

Both checkpoints are read a few rows at a time; what is written is a plain LoRA adapter in peft's
format (:mod:`.lora_folder`). What else differs (norms, biases) is said and not written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peftsurgery.checkpoint.arrays import FLOATS, Array, read_rows, wide_dtype
from peftsurgery.checkpoint.lora_folder import NewLayer, write_lora
from peftsurgery.checkpoint.low_rank import (
    Approximation,
    Blocks,
    Factors,
    Wanted,
    factors_of,
    share_lost,
)
from peftsurgery.checkpoint.rounding import ulp
from peftsurgery.checkpoint.tensor_bytes import read_bytes
from peftsurgery.errors import SurgeryError
from peftsurgery.tensor_file import Tensor, TensorFile

BLOCK = 2**21  # elements of each checkpoint that are in memory at once
Stored = tuple[TensorFile, Tensor]


@dataclass(frozen=True)
class Pair:
    """One weight in both checkpoints; ``module`` is what can have a LoRA there, or None.

    ``turned`` weights are stored as (in, out), as an embedding's are: its tokens go in.
    """

    name: str
    before: Stored
    after: Stored
    module: str | None = None
    kind: str = "linear"
    turned: bool = False


@dataclass(frozen=True)
class ExtractReport:
    """What was extracted: each layer's rank and error, and what differs and is not in it.

    ``left_out`` has the norms of the differences of tensors that no LoRA can say; ``lost`` is the
    share of the whole difference, these included, that the adapter lacks (Frobenius norms).
    """

    out: Path
    layers: Mapping[str, Approximation] = field(default_factory=dict)
    left_out: Mapping[str, float] = field(default_factory=dict)
    same: int = 0

    @property
    def lost(self) -> float:
        """Relative norm of what differs and is not in the adapter."""
        return share_lost(self.layers.values(), self.left_out.values())

    def to_dict(self) -> dict[str, Any]:
        """The report as ``--json`` prints it."""
        return {**asdict(self), "out": str(self.out), "lost": self.lost}

    def __str__(self) -> str:
        ranks = [layer.rank for layer in self.layers.values()]
        lines = [f"{len(ranks)} layers of rank {min(ranks)} to {max(ranks)}, in '{self.out}'"]
        lines.append(f"  lost: {self.lost:.2%} of the difference")
        worst = max(self.layers, key=lambda name: self.layers[name].lost)
        if self.layers[worst].lost > 1e-6:
            lines.append(f"  most, {self.layers[worst].lost:.2%}, at {worst}")
        if self.left_out:
            first = max(self.left_out, key=lambda name: self.left_out[name])
            what = f"{len(self.left_out)} tensors differ that no LoRA can say"
            lines.append(f"note: {what}, '{first}' most; they are not in the adapter")
        return "\n".join(lines)


def extract_files(
    pairs: list[Pair], part: Path, out: Path, wanted: Wanted, others: Mapping[str, Any]
) -> ExtractReport:
    """Write the adapter that turns one checkpoint into the other, to the directory ``part``.

    ``out`` is what it will be called, ``others`` are keys of its config. Raises SurgeryError:
    PSG403 for what is not finite, PSG415 if nothing differs that a LoRA could say, PSG416 for
    tensors that differ and are no floats, PSG603 if the system refuses.
    """
    layers: dict[str, Approximation] = {}
    left_out: dict[str, float] = {}
    same = [0]

    def differing() -> Iterator[NewLayer]:
        for pair in pairs:
            if _is_same(pair):
                same[0] += 1
            elif pair.module is None:
                left_out[pair.name] = _norm(pair)
            else:
                factors = _factors(pair, wanted)
                if factors.rank:
                    layers[pair.module] = factors.approximation
                    yield _layer(pair, factors)
                else:
                    left_out[pair.name] = factors.norm

    write_lora(part, differing(), others)
    if not layers:
        message = "the two checkpoints differ in no weight that a LoRA could change"
        raise SurgeryError("PSG415", message, "is the second one trained, and not the first?")
    return ExtractReport(out, layers, left_out, same[0])


def _is_same(pair: Pair) -> bool:
    """Whether a weight is the same, byte for byte. PSG416 for others that are no floats."""
    (file, tensor), (other, its) = pair.before, pair.after
    if (tensor.dtype, tensor.size) == (its.dtype, its.size):
        step = 2**20
        starts = range(0, tensor.size, step)
        chunks = ((start, min(step, tensor.size - start)) for start in starts)
        if all(read_bytes(file, tensor, *c) == read_bytes(other, its, *c) for c in chunks):
            return True
    for one in (tensor, its):
        if one.dtype not in FLOATS:
            message = f"'{pair.name}' differs, and is kept in {one.dtype}"
            raise SurgeryError("PSG416", message, "give checkpoints in floating-point numbers")
    return False


def _blocks(pair: Pair) -> Blocks:
    """The difference of a weight as a matrix, its first axis by all others. PSG403."""
    (file, tensor), (other, its) = pair.before, pair.after
    wide = max(wide_dtype(tensor.dtype), wide_dtype(its.dtype), key=lambda dtype: dtype.itemsize)
    rows = tensor.shape[0] if tensor.shape else 1
    step = max(1, BLOCK // max(tensor.count // max(rows, 1), 1))

    def blocks() -> Iterator[Array]:
        for start in range(0, rows, step):
            end = min(start + step, rows)
            one, two = read_rows(file, tensor, start, end), read_rows(other, its, start, end)
            gap = two.astype(wide) - one.astype(wide)
            if not np.isfinite(gap).all():
                raise SurgeryError("PSG403", f"'{pair.name}' holds NaN or infinity")
            yield gap.reshape(max(end - start, 1), -1)

    return blocks


def _norm(pair: Pair) -> float:
    return math.hypot(*(float(np.linalg.norm(block)) for block in _blocks(pair)()))


def _factors(pair: Pair, wanted: Wanted) -> Factors:
    """Factors of a weight's difference, without what its rounding explains if nothing is wished."""
    tensor = pair.before[1]
    columns = tensor.count // max(tensor.shape[0], 1)
    if wanted.rank is None and wanted.energy is None:
        wanted = Wanted(noise=_noise(pair, columns))
    return factors_of(_blocks(pair), columns, wanted)


def _noise(pair: Pair, columns: int) -> float:
    """Largest singular value that the rounding of the second checkpoint's elements explains.

    An error is as likely anywhere within half a unit in the last place. The norm of a random matrix
    is at most about the largest deviation of a row plus that of a column (Bandeira and van Handel,
    2016, arXiv:1408.6185).
    """
    (file, tensor), row, column = pair.after, 0.0, np.zeros(columns)
    step = max(1, BLOCK // max(columns, 1))
    for start in range(0, tensor.shape[0], step):
        stored = read_rows(file, tensor, start, min(start + step, tensor.shape[0]))
        values = stored.astype(wide_dtype(tensor.dtype)).reshape(-1, columns)
        square = np.square(ulp(values, values, tensor.dtype), dtype=np.float64) / 12
        row = max(row, float(square.sum(1).max()))
        column += square.sum(0)
    return math.sqrt(row) + math.sqrt(float(column.max()))


def _layer(pair: Pair, factors: Factors) -> NewLayer:
    """A difference in factors as the layer of its module."""
    assert pair.module is not None
    down, up = factors.right, factors.left
    if pair.turned:
        down, up = up.T, down.T
    kernel = pair.before[1].shape[2:]
    if kernel:
        down = down.reshape(len(down), -1, *kernel)
        up = up.reshape(*up.shape, *(1 for _ in kernel))
    return NewLayer(pair.module, pair.kind, down, up)
