"""Rows of a parameter that a product reads, where it reads some of them through views.

    linear(q, W[:32]); linear(k, W[32:])        32 rows of W each
    w_q, w_kv = W.split([32, 64]); x @ w_q.T    the same
    x @ W[:, :32]                               32 rows of W, which is (in, out)

As with the rows of an output (:mod:`.fused_rows`), every view is done to the numbers of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from peftsurgery.anatomy.fused_rows import as_slice
from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.site import Slice
from peftsurgery.anatomy.values import concrete, is_tensor, shape, value
from peftsurgery.capture.schemas import op


@dataclass(frozen=True, eq=False)
class WeightRows:
    """Some rows of a parameter, and whether it was transposed on the way."""

    parameter: fx.Node
    rows: Slice
    flipped: bool = False


def part_of(node: Any, out: int) -> WeightRows | None:
    """The part of a vector or matrix that a view is; None for another value.

    ``out`` is the dimension of the view that has the rows; of the other, all entries must be there.
    """
    views = _views(node)
    if len(views) < 2 or len(shape(views[0])) not in (1, 2):
        return None
    numbers = [_pushed(views, dim) for dim in range(len(shape(views[0])))]
    if any(found.dim() != len(numbers) for found in numbers) or out >= len(numbers):
        return None
    for flipped in (False, True)[: len(numbers)]:
        held = [found.mT for found in numbers] if flipped else numbers
        ways = [_along(found, dim) for dim, found in enumerate(held)]
        if None not in ways:
            dim = out ^ flipped
            return _part(views[0], dim, ways, flipped)
    return None


def _part(parameter: fx.Node, dim: int, ways: list[Any], flipped: bool) -> WeightRows | None:
    """The rows along ``dim``, if they are regular and in order, with all entries of each."""
    sizes, wanted = shape(parameter), ways[dim]
    rows = as_slice(wanted, sizes[dim])
    is_full = all(way == list(range(sizes[at])) for at, way in enumerate(ways) if at != dim)
    is_ordered = rows is not None and rows.indices() == wanted
    return WeightRows(parameter, rows, flipped) if rows and is_full and is_ordered else None


def _views(node: Any) -> list[fx.Node]:
    """A parameter and the views of it that lead to a node; nothing if it is no such view."""
    found: list[fx.Node] = []
    while isinstance(node, fx.Node):
        found.insert(0, node)
        if node.op == "get_attr":
            return found if is_tensor(node) else []
        is_view = has(node, Trait.VIEW | Trait.CAST) or op(node) == "getitem"
        if not is_view or not node.all_input_nodes:
            return []
        node = node.all_input_nodes[0]
    return []


def _pushed(views: list[fx.Node], dim: int) -> Tensor:
    """The numbers of a parameter's entries along a dimension, as its last view has them."""
    sizes = shape(views[0])
    around = [1] * len(sizes)
    around[dim] = -1
    found: Any = torch.arange(sizes[dim]).view(around).expand(sizes)
    for source, view in pairwise(views):
        if has(view, Trait.CAST):
            continue
        made = {source: found.contiguous() if has(view, Trait.RESHAPE) else found}

        def real(n: fx.Node, made: dict[fx.Node, Any] = made) -> Any:
            return made[n] if n in made else concrete(value(n))

        target: Any = view.target
        found = target(*fx.map_arg(view.args, real), **fx.map_arg(dict(view.kwargs), real))
    return torch.as_tensor(found)


def _along(found: Tensor, dim: int) -> list[int] | None:
    """The numbers along a dimension, if they are the same at all places of the others."""
    first = found if found.dim() == 1 else found.select(1 - dim, 0).unsqueeze(1 - dim)
    return first.flatten().tolist() if bool((found == first).all()) else None
