"""Computed weights: their values, and values of their parameters that make another one.

    W = f(P, ...)         f is what the model does: W * g, a normalised weight, a view, a sum
    solved(f, W')         P' with f(P', ...) = W', found by undoing f step by step

What is undone is checked: f of what was found must be W'. Where f cannot make every matrix (a
standardised or a spectrally normalised weight, a product of two factors), there is no P'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, fx

from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.values import (
    backward,
    concrete,
    is_size,
    is_tensor,
    operands,
    shape,
    value,
)
from peftsurgery.capture.schemas import arguments, op

Read = Callable[[fx.Node], Tensor]
Solution = dict[fx.Node, Tensor]
Axes = tuple[tuple[int, ...], tuple[int, ...]]
CLOSE = 1e-5
"""How far what was undone may be from what it is to be, relative to its largest entry."""


def computed(node: fx.Node, read: Read) -> Tensor:
    """The value of a weight: that of a tensor as ``read`` gives it, or what is computed of such.

    Casts are left out, so that it is in the dtype that is read.
    """
    known: dict[fx.Node, Any] = {}

    def result(found: fx.Node) -> Any:
        if found not in known:
            known[found] = _result(found, read, result)
        return known[found]

    made: Tensor = result(node)
    return made


def _result(node: fx.Node, read: Read, result: Callable[[fx.Node], Any]) -> Any:
    if is_size(node):
        return concrete(value(node))
    if node.op == "get_attr":
        # a flag of the mode is off: what a weight is folded into is the model that is shipped
        return read(node) if isinstance(value(node), Tensor) else False
    if has(node, Trait.CAST):
        return result(node.all_input_nodes[0])
    assert callable(node.target)
    kwargs = fx.map_arg(dict(node.kwargs), result)
    return node.target(*fx.map_arg(node.args, result), **kwargs)


def axes_of(node: fx.Node) -> Axes | None:
    """The order of a parameter's axes in which they make a weight when they are put together.

    With the weight's shape; None for one that is more than a parameter under other axes.
    """
    made_of = list(backward([node]))
    leaves = [found for found in made_of if found.op == "get_attr"]
    is_moved = all(has(n, Trait.LAYOUT | Trait.CAST) for n in made_of if n.op != "get_attr")
    if len(leaves) != 1 or not is_moved:
        return None
    sizes = [int(size) for size in shape(leaves[0])]
    numbers = torch.arange(math.prod(sizes)).view(sizes)
    made = computed(node, lambda _: numbers)
    for order in permutations(range(len(sizes))):
        if numbers.permute(order).flatten().equal(made.flatten()):
            return order, tuple(made.shape)
    return None


def expression(node: fx.Node) -> str:
    """What a weight is computed by, in words: equal for two that are computed alike."""
    if node.op == "get_attr":
        return str(node.target)
    parts = fx.map_arg((node.args, dict(node.kwargs)), lambda n: _Word(expression(n)))
    return f"{node.target}{parts}"


class _Word(str):
    """A text that is printed without quotes."""

    def __repr__(self) -> str:
        return str(self)


def solved(node: fx.Node, target: Tensor, read: Read, names: Collection[str]) -> Solution | None:
    """Values of parameters with which a computed weight is ``target``; None if none are found.

    ``names`` are those of the parameters; what else the weight is made of stays as it is. Lengths
    that rows are scaled by stay too, if they can.
    """
    for sets_lengths in (False, True):
        found = _Undoing(read, frozenset(names), sets_lengths).undone(node, target)
        if found is not None and _solves(found, node, target, read):
            return found
    return None


def _solves(found: Solution, node: fx.Node, target: Tensor, read: Read) -> bool:
    """Whether a computed weight is ``target`` with the values that were found."""
    made = computed(node, lambda n: found[n] if n in found else read(n))
    error, size = (made - target).abs().max(), target.abs().max()
    return bool(torch.isfinite(made).all() and error <= CLOSE * size)


@dataclass(frozen=True)
class _Undoing:
    """One way to undo what makes a weight.

    If it ``sets_lengths``, a parameter that rows are multiplied with becomes the length of each.
    """

    read: Read
    names: frozenset[str]
    sets_lengths: bool

    def undone(self, node: fx.Node, target: Tensor) -> Solution | None:
        """Values of parameters with which a node is ``target``, as far as can be told."""
        if node.op == "get_attr":
            is_mine = str(node.target) in self.names
            return {node: target.contiguous()} if is_mine else {}
        if has(node, Trait.CAST):
            return self.undone(node.all_input_nodes[0], target)
        if op(node) == "_weight_norm":
            given = arguments(node)
            lengths = torch.norm_except_dim(target, 2, given["dim"])
            return self._both((given["v"], target), (given["g"], lengths))
        if has(node, Trait.LAYOUT) and all(map(is_tensor, operands(node))):
            return self._both(*self._moved_back(node, target))
        if has(node, Trait.ADDITION | Trait.SCALING):
            return self._arithmetic(node, target)
        return None

    def _both(self, *parts: tuple[fx.Node, Tensor]) -> Solution | None:
        solution: Solution = {}
        for node, target in parts:
            found = self.undone(node, target)
            if found is None:
                return None
            solution |= found
        return solution

    def _moved_back(self, node: fx.Node, target: Tensor) -> Iterator[tuple[fx.Node, Tensor]]:
        """What each operand is to be: every entry of the target where it came from."""
        numbers, first = dict[fx.Node, Tensor](), 0
        for source in operands(node):
            count = computed(source, self.read).numel()
            numbers[source] = torch.arange(first, first + count, device=target.device).view(
                tuple(shape(source))
            )
            first += count
        where = _result(
            node, self.read, lambda n: numbers[n] if n in numbers else concrete(value(n))
        )
        whole = torch.cat([computed(source, self.read).flatten() for source in numbers])
        whole[where.flatten()] = target.flatten()
        pieces = whole.split([held.numel() for held in numbers.values()])
        yield from (
            (n, piece.view(tuple(shape(n)))) for n, piece in zip(numbers, pieces, strict=True)
        )

    def _arithmetic(self, node: fx.Node, target: Tensor) -> Solution | None:
        """Undo a sum, difference, product or quotient by its operand with most numbers.

        If both are made of one parameter, one is a length, or a mean, that the target has to have.
        """
        held = {n: _leaves(n) & self.names for n in operands(node)}
        mine = sorted((n for n in held if held[n]), key=lambda n: -value(n).numel())
        if not mine:
            return {}
        source = mine[0]
        if any(held[source] & held[n] for n in mine[1:]):
            return self.undone(source, target)
        others = [n for n in held if n is not source]
        if self.sets_lengths and has(node, Trait.SCALING) and len(mine) > 1 and op(node) == "mul":
            lengths = _lengths(target, tuple(shape(mine[1])))
            return self._both((source, target / lengths), (mine[1], lengths))
        known = {n: computed(n, self.read) for n in others}
        return self.undone(source, _inverse(node, source, target, known))


def _inverse(
    node: fx.Node, source: fx.Node, target: Tensor, known: Mapping[fx.Node, Tensor]
) -> Tensor:
    """What ``source`` is where an operator makes ``target`` of it, by one that is its inverse.

    What it makes of 0 and 1 tells the operator, if it is linear in the source.
    """

    def made(number: float) -> Tensor:
        like = torch.full(tuple(shape(source)), number, dtype=target.dtype)
        found = _result(
            node,
            known.__getitem__,
            lambda n: like if n is source else known[n] if n in known else concrete(value(n)),
        )
        return torch.as_tensor(found)

    at_zero, at_one = made(0.0), made(1.0)
    result: Tensor = (target - at_zero) / (at_one - at_zero)
    return result


def _lengths(target: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Euclidean lengths over the axes that a factor of these sizes does not have."""
    padded = (1,) * (target.dim() - len(sizes)) + sizes
    over = [axis for axis, size in enumerate(padded) if size == 1]
    lengths = torch.linalg.vector_norm(target, dim=over, keepdim=True) if over else target
    return lengths.view(sizes)


def _leaves(node: fx.Node) -> frozenset[str]:
    """The names of all tensors that a value is made of."""
    return frozenset(str(n.target) for n in backward([node]) if n.op == "get_attr")
