"""Tensors that are filled piece by piece, as the concatenations that they are.

    k = x.new_empty(n, 16)
    k[..., :8] = a                      k = cat([a, b], -1)
    k[..., 8:] = b

Writing in place leaves no edge from what is written to what reads it; a concatenation does, so
whatever follows values through the graph finds where these come from. The entries are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from peftsurgery.capture.module_calls import hand_on
from peftsurgery.capture.schemas import arguments, op, writes
from peftsurgery.capture.stack import inherit

aten = torch.ops.aten

_FRESH = {"empty", "new_empty", "empty_like", "zeros", "new_zeros", "zeros_like"}


@dataclass(frozen=True)
class Piece:
    """Entries ``start`` to ``end`` of a dimension: the view of them, what writes which value."""

    dim: int
    start: int
    end: int
    view: fx.Node
    write: fx.Node
    value: fx.Node


def join_pieces(graph: fx.Graph) -> None:
    """Replace each new tensor whose entries are all written in slices by their concatenation.

    It is left as it is if anything else reads or writes it before the last piece is written.
    """
    for node in list(graph.nodes):
        if op(node) in _FRESH:
            pieces = _pieces(node)
            if pieces and _is_whole(node, pieces):
                _join(graph, node, pieces)


def _pieces(fresh: fx.Node) -> list[Piece]:
    """The pieces written into slices of a tensor that nothing else reads."""
    found = (_piece(fresh, view) for view in fresh.users)
    return sorted((piece for piece in found if piece is not None), key=lambda piece: piece.start)


def _piece(fresh: fx.Node, view: fx.Node) -> Piece | None:
    shape = fresh.meta["val"].shape
    if view.target is not aten.slice.Tensor or len(view.users) != 1:
        return None
    write = next(iter(view.users))
    given = arguments(view)
    dim, start, end = given["dim"] % len(shape), given["start"] or 0, given["end"]
    size = shape[dim]
    is_write = write.target is aten.copy_.default and write.args[0] is view and not write.users
    numbers = (size, start, size if end is None else end)
    if not is_write or given["step"] != 1 or not all(isinstance(n, int) for n in numbers):
        return None
    start, end = (min(n + size if n < 0 else n, size) for n in numbers[1:])
    value = write.args[1]
    if not isinstance(value, fx.Node) or _kind(value) != _kind(view):
        return None  # it is cast or repeated on its way in
    return Piece(dim, start, end, view, write, value)


def _kind(node: fx.Node) -> tuple[object, ...]:
    """Dtype and sizes; symbols as their texts, since comparing them would add guards."""
    found = node.meta["val"]
    return found.dtype, *map(str, found.shape)


def _is_whole(fresh: fx.Node, pieces: Sequence[Piece]) -> bool:
    """Whether pieces lie end to end and fill a tensor, before anything else reads it."""
    dim, size = pieces[0].dim, fresh.meta["val"].shape[pieces[0].dim]
    edges = [0, *(piece.end for piece in pieces)]
    if any(piece.dim != dim for piece in pieces) or edges[-1] != size:
        return False
    if any(piece.start != edge for piece, edge in zip(pieces, edges, strict=False)):
        return False
    views, mine = {piece.view for piece in pieces}, {piece.write for piece in pieces}
    between, last = min(mine), max(mine)
    while between is not last:  # what was written could be changed before it is read
        if writes(between.target) and between not in mine:
            return False
        between = between.next
    return all(user in views or last < user for user in fresh.users)


def _join(graph: fx.Graph, fresh: fx.Node, pieces: Sequence[Piece]) -> None:
    last = max(piece.write for piece in pieces)
    with graph.inserting_after(last):
        values = [piece.value for piece in pieces]
        joined = graph.call_function(aten.cat.default, (values, pieces[0].dim))
    joined.meta["val"] = fresh.meta["val"]
    inherit(joined, fresh)
    for piece in pieces:
        graph.erase_node(piece.write)
        graph.erase_node(piece.view)
    hand_on(fresh, joined)
    fresh.replace_all_uses_with(joined)
    graph.erase_node(fresh)
