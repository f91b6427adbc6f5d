"""Products of rows that have matrices of their own, computed with fewer copies.

They ask which rows have which matrix, so they are for tensors on the processor, whose values are at
hand; with gradients, or where something looks on, all is computed as the program says.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from threading import local
from typing import Any

import torch
from torch import Tensor

from peftsurgery.capture.plain import are_plain, is_plain_call


def numbers_of(index: Tensor) -> list[int] | None:
    """The numbers in ``index``, (rows,), if they are at hand."""
    return index.tolist() if _is_at_hand(index) else None


def all_rows(mask: Tensor) -> bool:
    """Whether ``mask`` is true everywhere, and that is at hand."""
    return _is_at_hand(mask) and bool(mask.all())


def _is_at_hand(values: Tensor) -> bool:
    """Whether ``values`` can be read, no gradient is recorded, and nothing looks on."""
    return not torch.is_grad_enabled() and values.device.type == "cpu" and is_plain_call((values,))


def taken_rows(tensors: Sequence[Tensor], index: Tensor, numbers: Sequence[int] | None) -> Tensor:
    """The tensor of each row, (rows, ...), by its number in ``index``, (rows,).

    ``numbers`` are those of ``index`` where they are at hand (:func:`numbers_of`).
    """
    if numbers and are_plain(tensors):
        return torch.stack([tensors[number] for number in numbers])
    return torch.index_select(torch.stack(list(tensors)), 0, index)


def product_of_rows(
    x: Tensor, tensors: Sequence[Tensor], index: Tensor, numbers: Sequence[int] | None
) -> Tensor:
    """``x``, (rows, ..., n), times the transposed matrix (m, n) of each row, as `taken_rows`."""
    (product,) = products_of_rows(x, (tensors,), index, numbers)
    return product


def products_of_rows(
    x: Tensor,
    groups: Sequence[Sequence[Tensor]],
    index: Tensor,
    numbers: Sequence[int] | None,
) -> Sequence[Tensor]:
    """The product of ``x`` with each of several groups of matrices, as `product_of_rows`.

    Groups of one shape are multiplied in one product, which reads ``x`` once.
    """
    alike = len(groups) == 1 or len({group[0].shape for group in groups}) == 1
    if numbers and alike and x.dim() == 3 and are_plain((x,)):
        taken = _KEPT.stacked([group[number] for number in numbers for group in groups])
        if taken is not None and taken.dim() == 3:
            wide = taken if len(groups) == 1 else taken.view(len(numbers), -1, taken.shape[2])
            return torch.bmm(x, wide.transpose(1, 2)).chunk(len(groups), -1)
    if len(groups) > 1:
        return [product_of_rows(x, group, index, numbers) for group in groups]
    return (torch.matmul(x, taken_rows(groups[0], index, numbers).transpose(-1, -2)),)


def sum_of_rows(
    mask: Tensor,
    old: Tensor,
    scale: float,
    x: Tensor,
    tensors: Sequence[Tensor],
    index: Tensor,
    numbers: Sequence[int] | None,
    is_everywhere: bool,
) -> Tensor:
    """``old`` + ``scale`` times the `product_of_rows` where ``mask`` is true, else ``old``.

    Where every row has one (``is_everywhere``) the sum may be made in ``old``, which no one else
    may read; it differs by a few rounding errors then.
    """
    is_plain = x.dim() == 3 and x.dtype == old.dtype and are_plain((x, old))
    if is_everywhere and numbers and is_plain:
        taken = _KEPT.stacked([tensors[number] for number in numbers])
        if taken is not None and old.shape == (*x.shape[:2], taken.shape[1]):
            return old.baddbmm_(x, taken.transpose(1, 2), alpha=scale)
    new = old + scale * product_of_rows(x, tensors, index, numbers)
    return chosen_rows(mask, new, old, is_everywhere)


def chosen_rows(mask: Tensor, new: Tensor, old: Tensor, is_everywhere: bool) -> Tensor:
    """``new`` where ``mask`` is true, else ``old``; the new itself if it is true everywhere.

    ``is_everywhere`` says that it is, as far as that is at hand (:func:`all_rows`).
    """
    alike = is_everywhere and new.shape == old.shape and new.dtype == old.dtype
    return new if alike and are_plain((new, old)) else torch.where(mask, new, old)


class _KeptMemory(local):
    """Memory of one thread for stacks that are read at once and not again.

    Fresh memory for each may cost more than writing it: the system hands it out page by page.
    """

    LIMIT = 8 * 2**20

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.known: dict[Any, tuple[Tensor, Tensor]] = {}

    def stacked(self, tensors: list[Tensor]) -> Tensor | None:
        """A stack of tensors of one shape, until the next is asked for.

        None if it is large, or not all are ordinary tensors of one dtype.
        """
        is_like = len(set(map(_DTYPE, tensors))) == len(set(map(_NBYTES, tensors))) == 1
        if not is_like or not are_plain(tensors):
            return None
        first, count = tensors[0], len(tensors)
        place = count, first.dtype, first.shape
        if place not in self.known and not self._make_room(*place):
            return None
        stack, rows = self.known[place]
        torch.cat(tensors, out=rows)  # a stack's memory, without a view of each
        return stack

    def _make_room(self, count: int, dtype: torch.dtype, shape: torch.Size) -> bool:
        size = count * shape.numel() * dtype.itemsize
        if size > self.LIMIT:
            return False
        with torch.inference_mode(False):  # else it could not be written outside of it
            if self.memory.nbytes < size:
                self.memory, self.known = torch.empty(size, dtype=torch.uint8), {}
            flat = self.memory[:size].view(dtype)
            both = flat.view(count, *shape), flat.view(count * shape[0], *shape[1:])
            self.known[count, dtype, shape] = both
        return True


_DTYPE, _NBYTES = attrgetter("dtype"), attrgetter("nbytes")
_KEPT = _KeptMemory()
