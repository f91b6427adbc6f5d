"""What surgery inserted in a graph, read as sums.

    start + s * linear(h, B) - p / 2    ->    (1, start), s * (h, B), (-1/2, p)

Sums within sums are flattened, the numbers before their summands multiplied.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from peftsurgery.capture.schemas import overwritten


@dataclass(frozen=True)
class Summand:
    """``scale`` times the product of a hidden value with a weight ``up``, (out, rank)."""

    scale: float
    hidden: fx.Node
    up: fx.Node


def leaves_of_sum(
    node: fx.Node, scale: float, seen: set[fx.Node], casts: set[torch.dtype | None]
) -> Iterator[Summand | tuple[float, fx.Node]]:
    """The summands of a node, ``scale`` times, and what else is in the sum.

    A sum that is rounded before it is summed with more is part of that; ``casts`` fills with the
    dtypes that it is brought back to.
    """
    seen.add(node)
    match node.target, node.args:
        case ((operator.add | operator.sub), (fx.Node() as one, fx.Node() as other)):
            second = scale if node.target is operator.add else -scale
            parts = [(one, scale), (other, second)]
        case operator.mul, (int() | float() as number, fx.Node() as one):
            parts = [(one, scale * number)]
        case operator.mul, (fx.Node() as one, int() | float() as number):
            parts = [(one, scale * number)]
        case operator.truediv, (fx.Node() as one, int() | float() as number):
            parts = [(one, scale / number)]
        case operator.neg, (fx.Node() as one,):
            parts = [(one, -scale)]
        case _, (fx.Node() as one, fx.Node() as weight, *bias) if is_linear(node, bias):
            yield Summand(scale, one, weight)
            return
        case _:
            seen.discard(node)
            yield scale, node
            return
    for part, times in parts:
        rounded = _rounded_sum(part)
        if rounded is not None:
            casts.add(cast_to(part))
            yield from leaves_of_sum(rounded, times, seen, casts)
        elif is_part(part):
            yield from leaves_of_sum(part, times, seen, casts)
        else:
            yield times, part


def _rounded_sum(node: fx.Node) -> fx.Node | None:
    """The sum that a node is the rounded value of, in another dtype again."""
    if cast_to(node) is None or not is_part(node):
        return None
    rounded = source_of(node)
    if cast_to(rounded) is None or not is_part(rounded):
        return None
    found = source_of(rounded)
    return found if is_sum(found) and is_part(found) else None


def is_inserted(node: fx.Node) -> bool:
    """Whether surgery inserted a node."""
    return "surgery" in node.meta


def is_part(node: fx.Node) -> bool:
    """Whether surgery inserted a node for one reader."""
    return is_inserted(node) and len(node.users) == 1


def is_sum(node: fx.Node) -> bool:
    """Whether a node is a sum or a difference that surgery inserted."""
    return is_inserted(node) and node.target in (operator.add, operator.sub)


def is_linear(node: fx.Node, bias: Sequence[Any]) -> bool:
    """Whether a node is a linear as a rule says it, without a bias."""
    return node.target is F.linear and not node.kwargs and not any(bias)


def cast_to(node: fx.Node) -> torch.dtype | None:
    """The dtype that an inserted node casts to, if it does that."""
    if is_inserted(node) and node.op == "call_method" and node.target == "to":
        dtype = node.args[1] if len(node.args) == 2 else None
        return dtype if isinstance(dtype, torch.dtype) else None
    return None


def source_of(node: fx.Node) -> fx.Node:
    """The first value that a node reads."""
    return node.all_input_nodes[0]


def is_written_between(first: fx.Node, last: fx.Node) -> bool:
    """Whether something is changed in place after one node and up to another."""
    node = first
    while node is not last:
        node = node.next
        if writes(node):
            return True
    return False


def writes(node: fx.Node) -> bool:
    """Whether a node changes memory in place."""
    return any(True for _ in overwritten(node))
