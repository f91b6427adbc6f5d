"""Experts: wherever rows are multiplied by matrices of a stack, each by that of its own expert.

    grouped_mm(x, W, offsets)        rows in groups, a matrix for each group
    bmm(x, W), matmul(x, W)          a batch of rows for each expert
    bmm(x[:, None], W[ids])[:, 0]    for each row the matrix of its expert, by number
    linear(x, W[i], b[i])            the rows of one expert, in a loop: a site for each, of one W

Bindings: ``x`` (..., in), ``W`` the raw ``get_attr``, ``b`` (experts, out) if there is one, ``y``
(..., out), and the ``product`` that y is before a bias is added to it. W is (experts, out, in), or
``turned``: (experts, in, out). x and y are ``turned`` where their rows are columns.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import fx

from peftsurgery.anatomy.linears import make
from peftsurgery.anatomy.ops import Trait, has, meaning
from peftsurgery.anatomy.site import Site
from peftsurgery.anatomy.values import is_swap, is_tensor, operands, shape, sizes
from peftsurgery.capture.schemas import arguments, op


def find_experts(graph: fx.Graph, parameters: Collection[str]) -> dict[fx.Node, Site]:
    """The experts sites of a graph in its order, by the node that multiplies.

    A stack that is none of the ``parameters`` is arithmetic.
    """
    found = ((node, _experts(node)) for node in graph.nodes if node.op == "call_function")
    return {n: site for n, site in found if site is not None and site.parameter in parameters}


@dataclass(frozen=True)
class _StackProduct:
    """Rows times a stack, or columns if the stack ``comes_first``: W is (in, out) if ``turned``."""

    node: fx.Node
    x: fx.Node
    stack: fx.Node
    turned: bool
    comes_first: bool
    bias: Any = None


def _experts(node: fx.Node) -> Site | None:
    product = _product(node)
    if product is None:
        return None
    x, result, columns = _outer(product)
    turned = {"W"} if product.turned else set()
    turned |= {"x", "y"} if columns else set()
    nodes = {"x": x, "W": product.stack, "y": result, "product": result}
    count, *pair = (int(size) for size in shape(product.stack))
    rows = pair[1] if product.turned else pair[0]
    given = _bias(product.bias, (count, rows))
    if given is None and product.bias is None and not columns:
        given, nodes["y"] = _added_bias(result, (count, rows))
    if given is not None:
        nodes["b"] = given
    return make(nodes, frozenset(turned), kind="experts", experts=count, op=op(node))


def _product(node: fx.Node) -> _StackProduct | None:
    """A product of a value and a stack of matrices, or some of them, if it is one."""
    known = meaning(node)
    if len(known.operands) < 2 or len(node.args) <= max(known.operands[:2]) or node.kwargs:
        return None
    pair: list[Any] = [node.args[i] for i in known.operands[:2]]
    stacks = [_stack(operand) for operand in pair]
    comes_first = stacks[0] is not None
    stack, x = stacks[0] or stacks[1], pair[1 if comes_first else 0]
    if stack is None or all(stacks) or not is_tensor(x) or (comes_first and not known.turned):
        return None
    matrix, flipped = stack
    stands = known.turned and not comes_first  # x @ W: W is (in, out) as it stands
    bias: Any = next((node.args[i] for i in known.operands[2:] if i < len(node.args)), None)
    return _StackProduct(node, x, matrix, flipped != stands, comes_first, bias)


def _stack(node: Any) -> tuple[fx.Node, bool] | None:
    """The stack that an operand is, or is picked from, and whether its matrices are transposed."""
    flipped = False
    while isinstance(node, fx.Node) and node.op != "get_attr":
        if is_swap(node):
            flipped = not flipped
        elif not has(node, Trait.CAST) and not _picks(node):
            return None
        node = node.all_input_nodes[0]
    is_stack = isinstance(node, fx.Node) and len(shape(node)) == 3
    return (node, flipped) if is_stack else None


def _picks(node: fx.Node) -> bool:
    """Whether a node takes matrices of a stack, by their numbers or one after the other."""
    if op(node) == "getitem":
        return _picks(node.all_input_nodes[0])
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    if source is None or len(shape(source)) != 3 or not has(node, Trait.PICK | Trait.PARTING):
        return False
    if op(node) == "index":
        return len(node.args) == 2 and isinstance(node.args[1], list) and len(node.args[1]) == 1
    return op(node) in ("select", "unbind", "index_select") and arguments(node)["dim"] in (0, -3)


def _outer(product: _StackProduct) -> tuple[fx.Node, fx.Node, bool]:
    """X and y, and whether they are columns; without the axis that makes a matrix of each row."""
    node, x = product.node, product.x
    columns = product.comes_first and len(shape(x)) > 1
    axis = len(shape(x)) - (1 if columns else 2)
    users = list(node.users)
    if len(shape(x)) == 3 and sizes(x)[axis] == 1 and has(x, Trait.VIEW) and len(users) == 1:
        wide, back = x.all_input_nodes[0], users[0]
        is_back = has(back, Trait.VIEW) and op(back) in ("squeeze", "select")
        is_back = is_back and arguments(back).get("dim") in (axis, axis - 3)
        if is_back and (*sizes(wide)[:axis], 1, *sizes(wide)[axis:]) == sizes(x):
            return wide, back, False
    return x, node, columns


def _bias(node: Any, wanted: tuple[int, int]) -> fx.Node | None:
    """The parameter of these sizes that a bias is, or is picked from, an expert's or each row's."""
    while isinstance(node, fx.Node) and node.op != "get_attr":
        if not has(node, Trait.LAYOUT | Trait.PICK | Trait.CAST):
            return None
        node = node.all_input_nodes[0]
    return node if isinstance(node, fx.Node) and sizes(node) == wanted else None


def _added_bias(product: fx.Node, wanted: tuple[int, int]) -> tuple[fx.Node | None, fx.Node]:
    """A bias that is added to the product right after it, and the sum; else (None, product)."""
    users = list(product.users)
    if len(users) == 1 and op(users[0]) == "add":
        for operand in operands(users[0]):
            bias = None if operand is product else _bias(operand, wanted)
            if bias is not None:
                return bias, users[0]
    return None, product
