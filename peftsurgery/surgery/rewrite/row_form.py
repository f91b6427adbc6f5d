"""The running form of a program whose rows have adapters of their own: fewer copies.

    index_select(stack(every adapter's), rows)   ->   stack(each row's)     without gradients
    matmul(x, stack(each row's).mT)              ->   the same, of a stack in memory that is kept
    where(the rows that have one, new, old)      ->   new                   if every row has one

All give the same bits. They ask which rows those are, so they are for tensors on the processor,
whose values are at hand; all else is computed as the program says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from threading import local
from typing import Any

import torch
from torch import Tensor, fx

from peftsurgery.capture.plain import are_plain, is_plain_call
from peftsurgery.capture.schemas import overwritten

ATEN = torch.ops.aten
PRODUCTS = (ATEN.matmul.default, ATEN.bmm.default)


def row_form(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph that computes the same with fewer copies."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    is_written = any(True for node in copied.nodes for _ in overwritten(node))
    asked: dict[fx.Node, fx.Node] = {}
    for node in list(copied.nodes):
        if "surgery" not in node.meta:
            continue
        if node.target is ATEN.index_select.default and not node.kwargs:
            _take_once(node, asked)
        elif node.target is ATEN.where.self and not is_written:
            node.args = (*node.args, _asked(all_rows, node.args[0], asked))
            node.target = chosen_rows
    return copied


def _asked(question: Callable[..., Any], of: Any, asked: dict[fx.Node, fx.Node]) -> fx.Node:
    """The node that asks something of a value, once for all who ask, whatever its views."""
    while of.target is ATEN.view.default:
        of = of.args[0]
    if of not in asked:
        with of.graph.inserting_after(of):
            asked[of] = of.graph.call_function(question, (of,))
    return asked[of]


def _take_once(node: fx.Node, asked: dict[fx.Node, fx.Node]) -> None:
    """Let a node take its rows of the tensors themselves, and not of a stack of them all."""
    stack: Any = node.args[0]
    dim, index = node.args[1:]
    is_stack = isinstance(stack, fx.Node) and stack.target is ATEN.stack.default
    if is_stack and len(stack.args) == 1 and len(stack.users) == 1 and dim == 0:
        node.args, node.target = (
            (stack.args[0], index, _asked(numbers_of, index, asked)),
            taken_rows,
        )
        node.graph.erase_node(stack)
        _take_while_used(node)


def _take_while_used(taken: fx.Node) -> None:
    """Let the product that alone reads taken matrices, transposed, take them for itself."""
    turned = next(iter(taken.users))
    product = next(iter(turned.users), turned)
    is_turned = turned.target is ATEN.transpose.int and turned.args == (taken, -1, -2)
    is_product = product.target in PRODUCTS and product.args[1:] == (turned,)
    if is_turned and is_product and len(taken.users) == len(turned.users) == 1:
        product.args, product.target = (product.args[0], *taken.args), product_of_rows
        product.graph.erase_node(turned)
        product.graph.erase_node(taken)


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
    taken = None
    if numbers and are_plain((x, *tensors)):
        taken = _KEPT.stacked([tensors[number] for number in numbers])
    taken = taken_rows(tensors, index, numbers) if taken is None else taken
    return torch.matmul(x, taken.transpose(-1, -2))


class _KeptMemory(local):
    """Memory of one thread for stacks that are read at once and not again.

    Fresh memory for each may cost more than writing it: the system hands it out page by page.
    """

    LIMIT = 8 * 2**20

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.known: dict[Any, Tensor] = {}

    def stacked(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """A stack of tensors, until the next is asked for; None if it is large, or they differ."""
        if len(set(map(_DTYPE, tensors))) > 1:
            return None
        first, count = tensors[0], len(tensors)
        place = count, first.dtype, first.shape
        if place not in self.known and not self._make_room(*place):
            return None
        return torch.stack(list(tensors), out=self.known[place])

    def _make_room(self, count: int, dtype: torch.dtype, shape: torch.Size) -> bool:
        size = count * shape.numel() * dtype.itemsize
        if size > self.LIMIT:
            return False
        with torch.inference_mode(False):  # else it could not be written outside of it
            if self.memory.nbytes < size:
                self.memory, self.known = torch.empty(size, dtype=torch.uint8), {}
            self.known[count, dtype, shape] = self.memory[:size].view(dtype).view(count, *shape)
        return True


_DTYPE = attrgetter("dtype")
_KEPT = _KeptMemory()


def chosen_rows(mask: Tensor, new: Tensor, old: Tensor, is_everywhere: bool) -> Tensor:
    """``new`` where ``mask`` is true, else ``old``; the new itself if it is true everywhere.

    ``is_everywhere`` says that it is, as far as that is at hand (:func:`all_rows`).
    """
    alike = is_everywhere and new.shape == old.shape and new.dtype == old.dtype
    return new if alike and are_plain((new, old)) else torch.where(mask, new, old)
