"""The running form of a program whose rows have adapters of their own: fewer copies.

    index_select(stack(every adapter's), rows)   ->   stack(each row's)     without gradients
    where(the rows that have one, new, old)      ->   new                   if every row has one

Both give the same bits. They ask which rows those are, so they are for tensors on the processor,
whose values are at hand; all else is computed as the program says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from peftsurgery.capture.plain import is_plain_call
from peftsurgery.capture.schemas import overwritten

ATEN = torch.ops.aten


def row_form(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph that computes the same with fewer copies."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    is_written = any(True for node in copied.nodes for _ in overwritten(node))
    for node in list(copied.nodes):
        if "surgery" not in node.meta:
            continue
        if node.target is ATEN.index_select.default and not node.kwargs:
            _take_once(node)
        elif node.target is ATEN.where.self and not is_written:
            node.target = chosen_rows
    return copied


def _take_once(node: fx.Node) -> None:
    """Let a node take its rows of the tensors themselves, and not of a stack of them all."""
    stack: Any = node.args[0]
    dim, index = node.args[1:]
    is_stack = isinstance(stack, fx.Node) and stack.target is ATEN.stack.default
    if is_stack and len(stack.args) == 1 and len(stack.users) == 1 and dim == 0:
        node.args, node.target = (stack.args[0], index), taken_rows
        node.graph.erase_node(stack)


def taken_rows(tensors: Sequence[Tensor], index: Tensor) -> Tensor:
    """The tensor of each row, (rows, ...), by its number in ``index``, (rows,)."""
    if len(index) and not torch.is_grad_enabled() and _is_at_hand(index, *tensors):
        return torch.stack([tensors[number] for number in index.tolist()])
    return torch.index_select(torch.stack(list(tensors)), 0, index)


def chosen_rows(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` where ``mask`` is true, else ``old``; the new itself if it is true everywhere."""
    alike = new.shape == old.shape and new.dtype == old.dtype
    if alike and not torch.is_grad_enabled() and _is_at_hand(mask, new, old) and mask.all():
        return new
    return torch.where(mask, new, old)


def _is_at_hand(values: Tensor, *others: Tensor) -> bool:
    """Whether ``values`` can be read, and nothing looks on at what is done with them."""
    return values.device.type == "cpu" and is_plain_call((values, *others))
