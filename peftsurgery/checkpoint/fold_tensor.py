"""The new value of one tensor: computed in fp32 a few rows at a time, rounded once, measured.

What is measured is what a certificate says of it: how far it was moved, how far the rounding went,
and what of the base's numbers was not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from peftsurgery.checkpoint.arrays import (
    Array,
    as_bytes,
    read_rows,
    wide_dtype,
)
from peftsurgery.checkpoint.codecs.coded import CodedWeight
from peftsurgery.checkpoint.codecs.decoded import DecodedRows
from peftsurgery.checkpoint.fold_site import BLOCK, STACK, fold_site, is_by_lines, row_blocks
from peftsurgery.checkpoint.plan import FoldPlan, SiteFold
from peftsurgery.checkpoint.rounding import BlockMeasures, Rounding
from peftsurgery.errors import SurgeryError
from peftsurgery.tensor_file import Tensor, TensorFile

Found = Mapping[str, tuple[TensorFile, Tensor]]


@dataclass
class FoldMeasure:
    """How a tensor was changed: sums over its blocks.

    ``largest`` is the largest change of an element in units of its last place (ulp), in the dtype
    that is written; ``rounding`` is the largest rounding error, absolute. Where a weight is
    quantised again, ``survived`` is the share of the change that is in what was written (its
    projection), ``lost`` the norm of what is written otherwise than meant, and ``norm`` that of the
    change: all of it survives, and nothing is lost, where the written weight is the exact sum.
    """

    elements: int = 0
    largest: float = 0.0
    rounding: float = 0.0
    moved: int = 0
    _change: float = field(default=0.0, repr=False)
    _base: float = field(default=0.0, repr=False)
    _written: float | None = field(default=None, repr=False)
    _lost: float = field(default=0.0, repr=False)
    _rounding: Rounding = field(default_factory=Rounding, repr=False, compare=False)

    @property
    def is_quantised(self) -> bool:
        """Whether what was added is quantised again."""
        return self._written is not None

    def rounded(self, before: Array, exact: Array, dtype: str) -> tuple[Array, bool]:
        """Add a block: what was there, and the sum in full precision, which is given in ``dtype``.

        Tells whether all of it is known to be finite.
        """
        stored, found = self._rounding.rounded(before, exact, dtype)
        return stored, self._add(exact.size, found)

    def add_quantised(self, before: Array, exact: Array, written: Array, dtype: str) -> bool:
        """Add a block that is ``written`` in another way than by rounding, and is overwritten.

        Tells whether all of it is known to be finite.
        """
        gap, error = exact - before, written - exact
        moved = np.subtract(written, before)
        self._written = (self._written or 0.0) + float(np.vdot(gap, moved))
        self._lost += float(np.vdot(error, error))
        return self._add(exact.size, self._rounding.measured(before, exact, written, dtype))

    def _add(self, elements: int, found: BlockMeasures) -> bool:
        self.elements += elements
        self.moved += found.moved
        self._change += found.change
        self._base += found.base
        self.largest = max(self.largest, found.largest)
        self.rounding = max(self.rounding, found.rounding)
        return found.is_finite

    def to_dict(self) -> dict[str, Any]:
        """The measures, ``relative`` in parts of the base tensor's norm (None where that is 0)."""
        relative = (self._change / self._base) ** 0.5 if self._base else None
        said = {
            "elements": self.elements,
            "moved": self.moved,
            "relative": relative,
            "largest_ulp": self.largest,
            "rounding": self.rounding,
        }
        if self._written is None:
            return said
        share = self._written / self._change if self._change else None
        lost, norm = self._lost**0.5, self._change**0.5
        return {**said, "norm": norm, "survived": share, "lost": lost}


@dataclass(frozen=True)
class Folding:
    """Fold of one checkpoint: its plan, and where the tensors of base and adapter are.

    ``coded`` are the base's weights that are read through a codec; ``held`` has the tensors of the
    base as they are there, where ``base`` has those that are resized as they will be.
    """

    plan: FoldPlan
    base: Found
    adapter: Found
    coded: Mapping[str, CodedWeight] = field(default_factory=dict)
    held: Found = field(default_factory=dict)

    def blocks(
        self,
        name: str,
        dtype: str,
        change: FoldMeasure,
        read: Callable[[memoryview], object] = lambda content: None,
    ) -> Iterator[memoryview]:
        """Yield a changed tensor's bytes in ``dtype``, in order; ``change`` is filled on the way.

        ``read`` is told the base's bytes of the tensor, in order, unless they are a codec's or it
        is resized.
        Raises SurgeryError: PSG402 for an overflow of ``dtype``, PSG403 for NaN or infinity.
        """
        for before, exact in _few_rows(self.exact(name, read)):
            stored, is_finite = change.rounded(before, exact, dtype)
            if not is_finite:
                check_finite(name, dtype, before, exact, stored)
            yield as_bytes(stored)

    def exact(
        self, name: str, read: Callable[[memoryview], object] = lambda content: None
    ) -> Iterator[tuple[Array, Array]]:
        """Yield a tensor before and after, block by block, in the dtype of the sum.

        ``read`` is told what it is told by :meth:`blocks`.
        """
        if name in self.plan.pieces:
            yield from self._piece(name, read)
            return
        wide = wide_dtype(self.base[name][1].dtype)
        if name in self.plan.replaced:
            yield from self._replaced(name, read)
            return
        sites = self.plan.together(name)
        if self._is_stack_by_lines(name, sites):
            yield from self._stack(name, read)
            return
        others = sorted({name}.union(*(site.needed for site in sites)))
        keys = {key for site in sites for key in site.parameters.values()}
        learnt = {key: self._adapters(key, wide) for key in keys}
        decoded = DecodedRows({n: self.coded[n] for n in others if n in self.coded})
        tensors = [self.base[other][1] for other in others]
        for rows in row_blocks(tensors, sites, decoded.unit):
            stored = {other: self._stored(other, rows, decoded) for other in others}
            if name not in self.coded and name not in self.plan.resized:
                read(as_bytes(stored[name]))
            before = {other: value.astype(wide, copy=False) for other, value in stored.items()}
            for other in others:
                if other != name and not np.isfinite(before[other]).all():
                    raise SurgeryError("PSG403", f"'{other}' holds NaN or infinity")
            now = dict(before)
            for site in sites:
                fold_site(site, now, learnt, rows)
            yield before[name], now[name]

    def check_absent(self) -> None:
        """Refuse sites that would change a bias which the base does not have. PSG405."""
        wide = np.dtype(np.float32)
        for site in self.plan.sites:
            if not site.fold.keys() <= site.weights.keys() and site.needed <= self.base.keys():
                now = {name: self._stored(name).astype(wide) for name in site.needed}
                learnt = {key: self._adapters(key, wide) for key in site.parameters.values()}
                fold_site(site, now, learnt, None)

    def _replaced(
        self, name: str, read: Callable[[memoryview], object]
    ) -> Iterator[tuple[Array, Array]]:
        """Yield what :meth:`exact` yields, of a tensor that becomes one of the adapter's."""
        _, tensor = self.base[name]
        wide, key = wide_dtype(tensor.dtype), self.plan.replaced[name]
        decoded = DecodedRows({name: self.coded[name]} if name in self.coded else {})
        for rows in row_blocks([tensor], (), decoded.unit):
            was = self._stored(name, rows, decoded)
            if name not in self.coded and name not in self.plan.resized:
                read(as_bytes(was))
            yield was.astype(wide, copy=False), self._adapters(key, wide, rows)

    def _is_stack_by_lines(self, name: str, sites: Collection[SiteFold]) -> bool:
        """Whether a tensor is a stack whose matrices are folded a few lines at a time."""
        _, tensor = self.base[name]
        is_plain = name not in self.coded and name not in self.plan.resized
        return (
            len(tensor.shape) == STACK and is_plain and bool(sites) and all(map(is_by_lines, sites))
        )

    def _stack(
        self, name: str, read: Callable[[memoryview], object]
    ) -> Iterator[tuple[Array, Array]]:
        """Yield what :meth:`exact` yields, of a stack: lines of one matrix after the other."""
        file, tensor = self.base[name]
        experts, count, width = tensor.shape
        flat = replace(tensor, shape=(experts * count, width))
        for expert in range(experts):

            def stored(lines: slice, first: int = expert * count) -> Array:
                found = read_rows(file, flat, first + lines.start, first + lines.stop)
                read(as_bytes(found))
                return found

            yield from self._lines(name, name, expert, slice(0, count), stored)

    def _lines(
        self, name: str, stack: str, expert: int, lines: slice, stored: Callable[[slice], Array]
    ) -> Iterator[tuple[Array, Array]]:
        """Yield lines of a matrix in a stack before and after, a few at a time.

        ``stored`` reads them from the tensor of that name, in which they are counted from 0 on.
        """
        _, tensor = self.base[name]
        sites, wide = self.plan.together(stack), wide_dtype(tensor.dtype)
        learnt = self._of_expert(sites, wide, slice(expert, expert + 1))
        step = max(1, BLOCK // max(tensor.shape[-1], 1))
        for first in range(lines.start, lines.stop, step):
            some = slice(first, min(first + step, lines.stop))
            found = stored(slice(some.start - lines.start, some.stop - lines.start))
            before = found.astype(wide, copy=False)
            now = {stack: before[None]}
            for site in sites:
                fold_site(site, now, learnt, None, some)
            yield before, now[stack][0]

    def _of_expert(
        self, sites: Iterable[SiteFold], wide: np.dtype[Any], rows: slice
    ) -> dict[str, Array]:
        """The adapter's tensors for one matrix of a stack."""
        axes = {
            key: (site.rows or {}).get(short)
            for site in sites
            for short, key in site.parameters.items()
        }
        return {
            key: self._adapters(key, wide, None if axis is None else rows)
            for key, axis in axes.items()
        }

    def _piece(
        self, name: str, read: Callable[[memoryview], object]
    ) -> Iterator[tuple[Array, Array]]:
        """Yield what :meth:`exact` yields, of a piece of a stack: of one expert's matrix."""
        stack, expert, start, end = self.plan.pieces[name]
        sites = () if stack in self.plan.replaced else self.plan.together(stack)
        if sites and all(map(is_by_lines, sites)):
            decoded = DecodedRows(self.coded)

            def stored(lines: slice) -> Array:
                found = self._stored(name, lines, decoded)
                if name not in self.coded:
                    read(as_bytes(found))
                return found

            yield from self._lines(name, stack, expert, slice(start, end), stored)
            return
        yield self._whole_piece(name, read)

    def _whole_piece(self, name: str, read: Callable[[memoryview], object]) -> tuple[Array, Array]:
        """A piece before and after, where all of its expert's matrix is needed."""
        stack, expert, start, end = self.plan.pieces[name]
        rows, wide = slice(expert, expert + 1), wide_dtype(self.base[name][1].dtype)
        if name not in self.coded:
            read(as_bytes(self._stored(name)))
        mine = sorted(self.plan.stacks[stack], key=lambda piece: piece[1:])
        parts = [self._stored(piece) for piece, e, _, _ in mine if e == expert]
        before = np.concatenate(parts).astype(wide)[None]
        if stack in self.plan.replaced:
            now = {stack: self._adapters(self.plan.replaced[stack], wide, rows)}
        else:
            now = {stack: before}
            sites = self.plan.together(stack)
            learnt = self._of_expert(sites, wide, rows)
            for site in sites:
                fold_site(site, now, learnt, None)
        return before[0, start:end], now[stack][0, start:end]

    def _stored(
        self, name: str, rows: slice | None = None, decoded: DecodedRows | None = None
    ) -> Array:
        """Rows of a tensor of the base, those of codecs as they are ``decoded``."""
        if name in self.coded:
            return (decoded or DecodedRows(self.coded)).values(name, rows)
        file, tensor = self.base[name]
        if name in self.plan.resized:
            return self._resized(name, slice(0, tensor.shape[0]) if rows is None else rows)
        return read_rows(file, tensor, *(() if rows is None else (rows.start, rows.stop)))

    def _resized(self, name: str, rows: slice) -> Array:
        """Rows of a tensor that has another number of them than in the base."""
        file, tensor = self.held[name]
        old, (_, key) = tensor.shape[0], self.plan.resized[name]
        mine = read_rows(file, tensor, min(rows.start, old), min(rows.stop, old))
        more = slice(max(rows.start - old, 0), max(rows.stop - old, 0))
        if key is None:
            fresh = np.zeros((more.stop - more.start, *mine.shape[1:]), mine.dtype)
        else:
            fresh = self._adapters(key, mine.dtype)[more]
        return np.concatenate([mine, fresh])

    def _adapters(self, name: str, wide: np.dtype[Any], rows: slice | None = None) -> Array:
        file, tensor = self.adapter[name]
        value = read_rows(file, tensor, *(() if rows is None else (rows.start, rows.stop)))
        if not np.isfinite(value).all():
            raise SurgeryError("PSG505", f"{file.path}: '{name}' holds NaN or infinity")
        return value.astype(wide)


def _few_rows(folded: Iterable[tuple[Array, Array]]) -> Iterator[tuple[Array, Array]]:
    """Cut what could only be folded whole: what is left to do then takes the room of a few rows."""
    for before, exact in folded:
        step = max(1, BLOCK * len(exact) // max(exact.size, 1)) if exact.ndim else 0
        if not step or step >= len(exact):
            yield before, exact
            continue
        for start in range(0, len(exact), step):
            yield before[start : start + step], exact[start : start + step]


def check_finite(name: str, dtype: str, before: Array, exact: Array, written: Array) -> None:
    """Refuse a tensor with what is not finite. PSG402, PSG403."""
    if not np.isfinite(before).all():
        raise SurgeryError("PSG403", f"'{name}' holds NaN or infinity")
    if not np.isfinite(exact).all():
        raise SurgeryError("PSG403", f"'{name}' holds NaN or infinity once it is folded")
    if not np.isfinite(written).all():
        raise SurgeryError("PSG402", f"'{name}' overflows {dtype} once it is folded")
