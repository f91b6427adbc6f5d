"""The fold of one site: of its weights as the files have them, all rows at once or some of them.

What a site's rule calls a weight may be stored turned, under other axes, or as some rows of a fused
weight; here the one becomes the other, and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from peftsurgery.checkpoint.arrays import Array
from peftsurgery.checkpoint.plan import SiteFold
from peftsurgery.checkpoint.row_wise import folded
from peftsurgery.errors import SurgeryError
from peftsurgery.tensor_file import Tensor

STACK = 3  # axes of a stack of matrices
BLOCK = 2**18  # elements that are computed at once, where a rule folds each row by itself


def fold_site(
    site: SiteFold,
    now: dict[str, Array],
    learnt: Mapping[str, Array],
    rows: slice | None,
    lines: slice | None = None,
) -> None:
    """Fold the rows of a site's weights that are in ``now``, with the adapter's tensors.

    ``rows`` are those of the stored weights; None for all of them, or of what has none of its own.
    ``lines`` are those of the matrices in a stack, if it is not all. PSG405 for a change of a bias
    that is not there.
    """
    is_across = _is_across(site, max((now[name].ndim for name in site.needed), default=0))
    axes, cut = (site.lines, None) if is_across else (site.rows, rows)
    mine = rows
    if cut is not None and site.slice is not None:
        places, mine = _own(site.slice, cut)
        if not places.size:
            return

    def weight(short: str) -> Array | float:
        if short not in site.weights:
            return 0.0
        value = _lying(now[site.weights[short]], site, short)
        return value if site.slice is None else value[_places(site.slice, value, cut)]

    def parameter(short: str) -> Array:
        value = _along(learnt[site.parameters[short]], axes, short, mine)
        return _along(value, site.lines, short, lines)

    made: dict[str, Callable[[str], Any]] = dict.fromkeys((*site.weights, *site.absent), weight)
    made |= dict.fromkeys(site.parameters, parameter)
    for short, value in folded(site.fold, site.let, site.numbers, made).items():
        if short in site.weights:
            name = site.weights[short]
            now[name] = _stored(value, now[name], site, short, cut)
        elif np.any(value):
            message = f"{site.adapter} folds into a bias, and {site.module} has none"
            hint = "add a bias to the model, or keep the adapter"
            raise SurgeryError("PSG405", message, hint)


def is_by_rows(site: SiteFold, dims: int) -> bool:
    """Whether a fold needs no more of a weight than the rows that it gives.

    ``dims`` is the number of the weight's axes: of a stack, the last two are turned, and a slice is
    none of its first.
    """
    axes = site.lines if _is_across(site, dims) else site.rows
    return axes is not None and not site.axes and (dims <= 2 or site.slice is None)


def _is_across(site: SiteFold, dims: int) -> bool:
    """Whether the stored rows of a weight with so many axes are its columns."""
    return bool(site.turned) and dims <= 2


def row_blocks(
    tensors: Sequence[Tensor], sites: Iterable[SiteFold], unit: int
) -> Iterator[slice | None]:
    """Blocks of rows in which tensors can be folded by themselves; None for all of them at once.

    A block lies in one or more bands of ``unit`` rows, or within one.
    """
    largest = max(tensor.count for tensor in tensors)
    lengths = {tensor.shape[:1] for tensor in tensors}
    dims = max(len(tensor.shape) for tensor in tensors)
    are_by_rows = all(is_by_rows(site, dims) for site in sites)
    if not are_by_rows or len(lengths) != 1 or largest <= BLOCK:
        yield None
        return
    (rows,) = lengths.pop()
    step = max(1, BLOCK * rows // largest)
    band = max(unit, step // unit * unit)
    for first in range(0, rows, band):
        end = min(first + band, rows)
        for start in range(first, end, step):
            yield slice(start, min(start + step, end))


def _along(value: Array, axes: Mapping[str, int] | None, short: str, part: slice | None) -> Array:
    """A part of a parameter along its axis among ``axes``; all of it if it has none there."""
    axis = None if part is None or axes is None else axes.get(short)
    return value if axis is None else value[(slice(None),) * axis + (part,)]


def is_by_lines(site: SiteFold) -> bool:
    """Whether a fold of a stack needs no more of it than the lines of a matrix that it gives."""
    return site.lines is not None and len(site.needed) == 1 and is_by_rows(site, STACK)


def _lying(stored: Array, site: SiteFold, short: str) -> Array:
    """A stored weight as its rule has it, (out, in); of a fused one, all of it."""
    if short in site.axes:
        order, shape = site.axes[short]
        stored = stored.transpose(order).reshape(shape)
    return np.swapaxes(stored, -1, -2) if short in site.turned else stored


def _stored(value: Array, stored: Array, site: SiteFold, short: str, rows: slice | None) -> Array:
    """A weight of a rule as it is stored, where what is there now has what is not of the site."""
    if site.slice is not None:
        whole = np.array(_lying(stored, site, short))
        whole[_places(site.slice, whole, rows)] = value
        value = whole
    value = np.swapaxes(value, -1, -2) if short in site.turned else value
    if short not in site.axes:
        return value
    order, _ = site.axes[short]
    return value.reshape([stored.shape[axis] for axis in order]).transpose(np.argsort(order))


def _places(part: tuple[int, int, int, int], value: Array, rows: slice | None) -> Array:
    """Where the rows of a fused weight lie, in all of it or in some ``rows``, that are a site's."""
    return _own(part, slice(0, len(value)) if rows is None else rows)[0]


def _own(part: tuple[int, int, int, int], rows: slice) -> tuple[Array, slice]:
    """The rows of a site among some of a fused weight: their places there, and their own numbers.

    ``part`` is a :attr:`SiteFold.slice`. The own numbers follow one another.
    """
    start, length, period, _ = part
    group, place = np.divmod(np.arange(rows.start, rows.stop), period)
    places = np.flatnonzero((place >= start) & (place < start + length))
    own = (group * length + place - start)[places]
    return places, slice(own[0], own[-1] + 1) if own.size else slice(0, 0)
