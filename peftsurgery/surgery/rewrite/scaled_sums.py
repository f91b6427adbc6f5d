"""Sums of two values that surgery inserted, in one operation, without casts that change nothing.

    y + s * p                             ->   add(y, p, alpha=s)
    (y.to(wide) + s * p.to(wide)).to(h)   ->   add(y, p, alpha=s)    y, p and s in half precision h
    x.to(wide).to(h)                      ->   x.to(h)

In half precision torch computes the numbers of a sum in float32 and rounds once, which is what the
casts say; but it rounds ``alpha`` before, so a scale that has no half precision is left where it
is. In float32 the product is not rounded by itself before it is added.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from peftsurgery.surgery.rewrite.dtypes import HALVES, has_number
from peftsurgery.surgery.rewrite.inserted_sums import (
    Summand,
    cast_to,
    is_part,
    is_sum,
    is_written_between,
    leaves_of_sum,
    source_of,
)

SIZE = torch.ops.aten.sym_size.int


class ScaledSum:
    """The sum of a value and ``scale`` times another, as a graph's node calls it.

    If ``rounded`` is a dtype, the sum is made in the dtype ``compute`` and rounded to that one.
    """

    __name__ = "scaled_sum"

    def __init__(
        self, scale: float, compute: torch.dtype | None, rounded: torch.dtype | None
    ) -> None:
        self.scale, self.compute, self.rounded = scale, compute, rounded
        self.dtypes = frozenset(filter(self._is_kept_by, (*HALVES, torch.float32, torch.float64)))

    def _is_kept_by(self, dtype: torch.dtype) -> bool:
        """Whether a sum in this dtype multiplies by the scale, and not by a rounded one."""
        return dtype not in HALVES or has_number(dtype, self.scale)

    def __call__(self, start: Tensor, other: Tensor) -> Tensor:
        """The sum, in the dtype of both values if it is rounded to that one."""
        own = self.rounded or other.dtype
        if start.dtype == other.dtype == own and own in self.dtypes:
            return torch.add(start, other, alpha=self.scale)
        if self.compute is None or self.rounded is None:
            return start + self.scale * other
        return (start.to(self.compute) + self.scale * other.to(self.compute)).to(self.rounded)


def join_scaled_sums(graph: fx.Graph) -> None:
    """Make each inserted sum of a value and a scaled or cast one by one node, in place."""
    # rounded sums first: what is within one is no sum by itself
    for root in sorted(graph.nodes, key=lambda node: cast_to(node) is None):
        found = _sum_of_two(root) if root.users else None
        if found is not None:
            call, operands = found
            with graph.inserting_before(root):
                joined = graph.call_function(call, operands)
            joined.meta = dict(root.meta)
            root.replace_all_uses_with(joined)


def _sum_of_two(root: fx.Node) -> tuple[ScaledSum, tuple[fx.Node, fx.Node]] | None:
    """The sum that a node is, and its two values, if there is less to do than it says."""
    rounded = cast_to(root)
    top = root if rounded is None else source_of(root)
    if not is_sum(top) or (top is not root and not is_part(top)):
        return None
    seen, casts = {top}, set[torch.dtype | None]()
    leaves = list(leaves_of_sum(top, 1, seen, casts))
    plain = [leaf for leaf in leaves if not isinstance(leaf, Summand)]
    if casts or len(leaves) != 2 or len(plain) != 2 or _is_number(top):
        return None
    (first, start), (scale, other) = sorted(plain, key=lambda leaf: leaf[0] != 1)
    dtypes = {cast_to(start), cast_to(other)}
    (compute,) = dtypes if len(dtypes) == 1 else (None,)
    if rounded is not None:
        if rounded not in HALVES or compute is not torch.float32:
            return None
        seen |= {start, other}
        start, other = source_of(start), source_of(other)
    elif scale == 1:
        return None
    if first != 1 or any(is_written_between(node, root) for node in seen):
        return None
    call = ScaledSum(scale, compute, rounded)
    return (call, (start, other)) if rounded is None or rounded in call.dtypes else None


def _is_number(node: fx.Node) -> bool:
    """Whether a node stands for a number: a size, or what is made of sizes alone."""
    if "val" in node.meta:
        return not isinstance(node.meta["val"], Tensor)
    made_of = node.all_input_nodes
    is_arithmetic = getattr(node.target, "__module__", None) == operator.add.__module__
    return node.target is SIZE or (is_arithmetic and all(map(_is_number, made_of)))


def drop_round_trips(graph: fx.Graph) -> None:
    """Cast a value at once to the narrower dtype that it is cast to by way of a wider one."""
    for node in graph.nodes:
        narrow = cast_to(node)
        if narrow is None:
            continue
        wider = source_of(node)
        wide = cast_to(wider)
        is_wider = wide is not None and torch.promote_types(narrow, wide) == wide
        if is_wider and not is_written_between(wider, node):
            node.args = (source_of(wider), narrow)
