"""Sums over axes that have names, as the products of matrices that they are.

    einsum("ibh,hnd->ibnd", x, W)       einsum("abi,io->abo", x, W.flatten(1)).unflatten(-1, (n, d))
    einsum("ibnd,hnd->ibh", y, W)       einsum("abi,io->abo", y.flatten(2), W.flatten(1).mT)
    tensordot(x, W, 1)                  the same, with tensordot
    einsum("ibnd,jbnd->bnij", q, k)     matmul(q.permute(1, 2, 0, 3), k.permute(1, 2, 3, 0))

A layer that has a weight of its own for every head is a linear whose weight is stored under other
axes, and attention is what it is in whatever order its axes are. torch computes all of them in one
way: it orders axes, puts some together and multiplies matrices. What is spelled out here is what it
does inside, in the same order, so results are equal to the last bit.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from peftsurgery.capture.module_calls import hand_on
from peftsurgery.capture.schemas import arguments
from peftsurgery.capture.sizes import as_known
from peftsurgery.capture.stack import inherit
from peftsurgery.reach import reach

aten = torch.ops.aten


@dataclass(frozen=True)
class Contraction:
    """A sum over axes that two values share; each axis has a letter.

    ``summed`` are those in the order in which torch puts them together, ``both`` the other shared
    axes, ``own`` those that are each value's own, all in the order of the result.
    """

    pair: tuple[fx.Node, fx.Node]
    axes: tuple[str, str]
    result: str
    summed: str

    @property
    def both(self) -> str:
        """The shared axes that stay."""
        return "".join(
            axis for axis in self.result if axis in self.axes[0] and axis in self.axes[1]
        )

    @property
    def own(self) -> tuple[str, str]:
        """The axes of each value alone."""
        first, second = self.axes
        return (
            "".join(axis for axis in self.result if axis in first and axis not in second),
            "".join(axis for axis in self.result if axis in second and axis not in first),
        )

    @property
    def is_exact(self) -> bool:
        """Whether no axis is read twice, summed by itself, repeated, or new."""
        is_once = all(len(set(axes)) == len(axes) for axes in (*self.axes, self.result))
        kept = set(self.result) | set(self.summed) == set("".join(self.axes))
        sizes = [
            dict(zip(axes, map(as_known, node.meta["val"].shape), strict=True))
            for axes, node in zip(self.axes, self.pair, strict=True)
        ]
        shared = self.both + self.summed
        return is_once and kept and all(sizes[0][axis] == sizes[1][axis] for axis in shared)

    def is_plain(self, weight: int) -> bool:
        """Whether one is a matrix as it stands, and the other's rows or columns meet it."""
        given, out = self.axes[1 - weight], self.own[weight]
        return (
            len(self.axes[weight]) == 2
            and self.summed in (given[-1:], given[-2:-1])
            and out in (self.result[-1:], self.result[-2:-1])
        )


def spell_out(graph: fx.Graph) -> None:
    """Replace sums over named axes by products of matrices, where they are no more than that."""
    for node in list(graph.nodes):
        found = _contraction(node)
        if found is None or not found.is_exact or not found.summed:
            continue
        weights = [index for index in (0, 1) if _is_weight(found.pair[index])]
        tape = _Tape(graph, node)
        if len(weights) == 1:
            weight = weights[0]
            if found.own[weight] and not found.both and not found.is_plain(weight):
                _multiply_weight(tape, found, weight)
        elif not weights and found.both and [len(own) for own in found.own] == [1, 1]:
            _multiply_stacks(tape, found)


def _contraction(node: fx.Node) -> Contraction | None:
    """What a node sums over, if it has two operands."""
    given = arguments(node) if node.op == "call_function" else {}
    if node.target is aten.einsum.default and len(given["tensors"]) == 2:
        axes = _letters(given["equation"], given["tensors"])
        return axes and _of(given["tensors"], axes)
    if node.target is aten.tensordot.default and not _is_weight(given["self"]):
        axes = _numbered(given)
        summed = "".join(axes[0][dim] for dim in given["dims_self"])
        return Contraction((given["self"], given["other"]), axes[:2], axes[2], summed)
    return None


def _of(pair: Sequence[fx.Node], axes: tuple[str, str, str]) -> Contraction:
    """What einsum does: it puts the axes that are summed in the order of their letters."""
    first, second, result = axes
    summed = sorted(axis for axis in first if axis in second and axis not in result)
    return Contraction((pair[0], pair[1]), (first, second), result, "".join(summed))


def _is_weight(node: fx.Node) -> bool:
    """Whether a value is computed of the model's own tensors alone."""
    made = reach([node], lambda n: n.all_input_nodes)
    return all(n.op == "get_attr" for n in made if not n.all_input_nodes)


def _letters(equation: str, pair: Sequence[fx.Node]) -> tuple[str, str, str] | None:
    """The axes of two operands and of the result; what dots stand for has capital letters."""
    texts, arrow, result = equation.replace(" ", "").partition("->")
    first, comma, second = texts.partition(",")
    if not arrow or not comma:
        return None
    spare = "".join(letter for letter in string.ascii_uppercase if letter not in equation)
    axes = []
    for text, node in zip((first, second), pair, strict=True):
        unnamed = node.meta["val"].dim() - len(text.replace("...", ""))
        axes.append(text.replace("...", spare[len(spare) - unnamed :]))
    most = max(axes, key=len)
    dots = "".join(axis for axis in spare if axis in most)
    return axes[0], axes[1], result.replace("...", dots)


def _numbered(given: dict[str, Any]) -> tuple[str, str, str]:
    """The axes of a tensordot: those that are summed have the same letters."""
    letters = iter(string.ascii_letters)
    pair = [[next(letters) for _ in n.meta["val"].shape] for n in (given["self"], given["other"])]
    for one, other in zip(given["dims_self"], given["dims_other"], strict=True):
        pair[1][other] = pair[0][one]
    first, second = ("".join(axes) for axes in pair)
    return first, second, "".join(a for a in first + second if (a in first) != (a in second))


def _multiply_weight(tape: _Tape, found: Contraction, weight: int) -> None:
    """Multiply rows of a signal with the matrix that a weight is."""
    around, out, summed = found.own[1 - weight], found.own[weight], found.summed
    sizes = found.pair[weight].meta["val"].shape
    wide = [sizes[found.axes[weight].index(axis)] for axis in out]
    parts = (summed, out) if weight else (out, summed)
    matrix = tape.ordered(found.pair[weight], found.axes[weight], "".join(parts))
    matrix = tape.flat(tape.flat(matrix, 0, parts[0]), 1, parts[1])
    rows = tape.ordered(found.pair[1 - weight], found.axes[1 - weight], around + summed)
    rows = tape.flat(rows, len(around), summed)
    made = tape.product(matrix, rows, weight)
    if len(wide) > 1:
        made = tape.call(aten.unflatten.int, made, len(around), wide)
    tape.end(tape.ordered(made, around + out, found.result))


def _multiply_stacks(tape: _Tape, found: Contraction) -> None:
    """Multiply two stacks of matrices."""
    (first, second), both, summed = found.own, found.both, found.summed
    left = tape.ordered(found.pair[0], found.axes[0], both + first + summed)
    right = tape.ordered(found.pair[1], found.axes[1], both + second + summed)
    left, right = (tape.flat(value, len(both) + 1, summed) for value in (left, right))
    turned = tape.call(aten.transpose.int, right, -2, -1)
    made = tape.call(aten.matmul.default, left, turned)
    tape.end(tape.ordered(made, both + first + second, found.result))


class _Tape:
    """New nodes in the place of one."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self.graph, self.node = graph, node

    def call(self, target: Any, *args: Any) -> fx.Node:
        """A node that calls an operator, with its value."""
        with self.graph.inserting_before(self.node):
            made = self.graph.call_function(target, args)
        inherit(made, self.node)
        made.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return made

    def ordered(self, value: fx.Node, axes: str, wanted: str) -> fx.Node:
        """A value with its axes in another order."""
        order = [axes.index(axis) for axis in wanted]
        return value if axes == wanted else self.call(aten.permute.default, value, order)

    def flat(self, value: fx.Node, start: int, axes: str) -> fx.Node:
        """A value with some of its axes put together."""
        end = start + len(axes) - 1
        return value if end == start else self.call(aten.flatten.using_ints, value, start, end)

    def product(self, matrix: fx.Node, rows: fx.Node, weight: int) -> fx.Node:
        """The product of rows with a matrix, as the node that is replaced computes it."""
        last = rows.meta["val"].dim() - 1
        if self.node.target is aten.tensordot.default:
            return self.call(aten.tensordot.default, rows, matrix, [last], [0])
        around = string.ascii_lowercase[:last]
        if weight == 0:
            return self.call(aten.einsum.default, f"zy,{around}y->{around}z", [matrix, rows])
        return self.call(aten.einsum.default, f"{around}y,yz->{around}z", [rows, matrix])

    def end(self, made: fx.Node) -> None:
        """Let a node take the place of the one that is replaced."""
        hand_on(self.node, made)
        self.node.replace_all_uses_with(made)
        self.graph.erase_node(self.node)
