"""The running form of a program whose rows have adapters of their own: fewer copies.

    index_select(stack(every adapter's), rows)   ->   stack(each row's)     without gradients
    matmul(x, stack(each row's).mT)              ->   the same, of a stack in memory that is kept
    two of these, of one x                       ->   one product
    where(the rows that have one, new, old)      ->   new                   if every row has one
    ... whose new is old + s * matmul(...)       ->   the product is added in the old one's memory

All but the last give the same bits; that one differs by a few rounding errors. Which rows those
are is asked once in a program (:mod:`.row_products`).
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx

from peftsurgery.capture.schemas import overwritten
from peftsurgery.surgery.rewrite.row_products import (
    all_rows,
    chosen_rows,
    numbers_of,
    product_of_rows,
    products_of_rows,
    sum_of_rows,
    taken_rows,
)

ATEN = torch.ops.aten
PRODUCTS = (ATEN.matmul.default, ATEN.bmm.default)
MULTIPLIED = (operator.mul, ATEN.mul.Tensor, ATEN.mul.Scalar)
ADDED = (operator.add, ATEN.add.Tensor)
FRESH = (ATEN.linear.default, ATEN.matmul.default, ATEN.addmm.default)
"""Operators whose result is no view of what they are given."""


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
            _add_in_place(node)
    if not is_written:
        _join_products(copied)
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


def _add_in_place(chosen: fx.Node) -> None:
    """Let the choice between a value and its sum with a scaled product make the sum itself.

    The value is made by an operator whose result is new, and none but these two read it.
    """
    mask, new, old, is_everywhere = cast("Any", chosen.args)
    found = _scaled_product(new, old)
    if found is None or old.target not in FRESH or {*old.users} != {new, chosen}:
        return
    scale, product = found
    scaled = next(iter(product.users))
    chosen.args = (mask, old, scale, *product.args, is_everywhere)
    chosen.target = sum_of_rows
    for node in dict.fromkeys((new, scaled, product)):
        chosen.graph.erase_node(node)


def _scaled_product(new: Any, old: Any) -> tuple[float, fx.Node] | None:
    """The number s and the product P of rows, if ``new`` is ``old`` + s * P and alone reads P."""
    if new.target not in ADDED or new.kwargs or len(new.users) != 1 or old not in new.args:
        return None
    (other,) = [value for value in new.args if value is not old] or (None,)
    factors: tuple[Any, ...] = (1.0, other)
    if isinstance(other, fx.Node) and other.target in MULTIPLIED and not other.kwargs:
        factors = tuple(sorted(other.args, key=lambda value: isinstance(value, fx.Node)))
    scale, product = factors
    is_alone = isinstance(other, fx.Node) and len(other.users) == 1
    is_product = isinstance(product, fx.Node) and product.target is product_of_rows
    if is_alone and is_product and isinstance(scale, float | int) and len(product.users) == 1:
        return float(scale), product
    return None


def _join_products(graph: fx.Graph) -> None:
    """Make the products of one value with its rows' matrices, at several sites, in one."""
    alike = defaultdict[Any, list[fx.Node]](list)
    for node in graph.nodes:
        if node.target is product_of_rows:
            x, _, *rows = node.args
            alike[(x, *rows)].append(node)
    for (x, *rows), nodes in alike.items():
        matrices: list[Any] = [node.args[1] for node in nodes]
        reads = [read for group in matrices for read in group]
        if len(nodes) == 1 or any(read.op != "get_attr" for read in reads):
            continue
        for read in reads:
            if nodes[0] < read:
                nodes[0].prepend(read)
        with graph.inserting_before(nodes[0]):
            joined = graph.call_function(products_of_rows, (x, matrices, *rows))
            for number, node in enumerate(nodes):
                one = graph.call_function(operator.getitem, (joined, number))
                node.replace_all_uses_with(one)
        for node in nodes:
            graph.erase_node(node)
