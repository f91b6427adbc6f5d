"""Views of a tensor in a row or beside each other, made by one operator.

    reshape(transpose(reshape(x, [n, -1, 1, 64]), 1, 2), [n, 1, -1])   ->   reshape(x, [n, 1, -1])
    slice(x, 3, 0, 32), slice(x, 3, 32, 64)                            ->   split_with_sizes(...)

The values are the same, and so is their order. Their memory may be laid out in another way where an
axis has one entry. The last of a row may give back a view where there was a copy, so this is not
for graphs that write to memory.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from peftsurgery.capture.schemas import arguments, op

aten = torch.ops.aten

_SHAPED = ("view", "reshape", "_unsafe_view")


def join_reshapes(graph: fx.Graph) -> None:
    """Replace views in a row that keep the order of all entries by one."""
    for node in list(graph.nodes):
        if any(user.op == "output" for user in node.users):
            continue
        shape = _shape(node)
        if shape is None:
            continue
        source: Any = node.args[0]
        while len(source.users) == 1 and _keeps_order(source):
            source = source.args[0]
        node.target, node.args, node.kwargs = aten.reshape.default, (source, shape), {}
    for node in reversed(graph.nodes):
        if not node.users and _keeps_order(node):
            graph.erase_node(node)


def _shape(node: fx.Node) -> list[Any] | None:
    """The sizes that a node reshapes to, as it says them; None for any other."""
    if op(node) in _SHAPED:
        shape = node.args[1] if len(node.args) == 2 and not node.kwargs else None
        return list(shape) if isinstance(shape, (list, tuple)) else None
    order = _order(node)
    if order is None or not _keeps_order(node):
        return None
    inner: Any = node.args[0]
    if len(inner.users) > 1 or op(inner) not in _SHAPED:
        return None
    shape = _shape(inner)
    return None if shape is None else [shape[place] for place in order]


def _keeps_order(node: fx.Node) -> bool:
    """Whether a node gives all entries of its first argument in their order, and nothing else."""
    if op(node) in _SHAPED:
        return _shape(node) is not None
    order = _order(node)
    if order is None:
        return False
    sizes = _sizes(node.args[0])
    moved = [place for place in order if not _is_one(sizes[place])]
    return moved == sorted(moved)


def _order(node: fx.Node) -> list[int] | None:
    """Where the axes of a transposed value come from."""
    given: tuple[Any, ...] = node.args
    rank = len(_sizes(given[0])) if given else 0
    match op(node), given:
        case "transpose", (_, int() as one, int() as other) if rank:
            order = list(range(rank))
            order[one], order[other] = order[other], order[one]
            return order
        case "permute", (_, [*axes]) if rank and all(isinstance(axis, int) for axis in axes):
            return [axis % rank for axis in axes]
    return None


def _sizes(value: Any) -> Sequence[Any]:
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    return found.shape if isinstance(found, Tensor) else ()


def _is_one(size: Any) -> bool:
    return type(size) is int and size == 1


def join_slices(graph: fx.Graph) -> None:
    """Split a tensor once where slices of it lie end to end and are all of it."""
    groups: dict[tuple[fx.Node, int], list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        source: Any = node.args[0]
        rank = len(_sizes(source))
        if rank and not any(user.op == "output" for user in node.users):
            groups.setdefault((source, arguments(node)["dim"] % rank), []).append(node)
    for (source, dim), slices in groups.items():
        sizes = _pieces(slices, _sizes(source)[dim])
        if len(sizes) > 1:
            _split(graph, dim, slices, sizes)


def _pieces(slices: Sequence[fx.Node], whole: Any) -> dict[fx.Node, int]:
    """The slices in the order in which they lie, with their sizes, if together they are whole."""
    if type(whole) is not int:
        return {}
    bounds = {}
    for node in slices:
        given = arguments(node)
        start, end = given["start"] or 0, whole if given["end"] is None else given["end"]
        if given["step"] != 1 or type(start) is not int or type(end) is not int:
            return {}
        bounds[node] = slice(start, end).indices(whole)[:2]
    ordered = sorted(bounds, key=lambda node: bounds[node])
    starts, ends = zip(*(bounds[node] for node in ordered), strict=True)
    if (*starts, whole) != (0, *ends):
        return {}
    return {node: bounds[node][1] - bounds[node][0] for node in ordered}


def _split(
    graph: fx.Graph, dim: int, slices: Sequence[fx.Node], sizes: Mapping[fx.Node, int]
) -> None:
    with graph.inserting_before(slices[0]):
        given = (slices[0].args[0], [*sizes.values()], dim)
        pieces = graph.call_function(aten.split_with_sizes.default, given)
    for number, node in enumerate(sizes):
        with graph.inserting_before(node):
            piece = graph.call_function(operator.getitem, (pieces, number))
        piece.meta = {**node.meta}
        node.replace_all_uses_with(piece)
        graph.erase_node(node)
