"""Linear sites: every place where a signal is multiplied by a weight matrix, however it is spelled.

    linear(x, W, b)                 W is (out, in)
    addmm(b, x, W), mm(x, W)        W is (in, out)          it is ``turned``
    matmul(x, W.T) + b              W is (out, in) again
    grouped_mm(x, W3), bmm(x, W3)   one matrix an expert    kind "experts"

Bindings: ``x`` (..., in), ``W`` the raw ``get_attr``, ``b`` a bias if any, ``y`` (..., out)
with the leading sizes of ``x``, so that ``y + linear(linear(x, A), B)`` is right at ``y``. Where an
addmm works on rows flattened by a view and its result is viewed back, x and y are the outer values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from .site import Site
from .values import argument, is_tensor, op, operands, parameter_of, shape, sizes

VIEWS = frozenset(("view", "reshape", "_unsafe_view", "flatten"))


def find_linears(graph: fx.Graph) -> dict[fx.Node, Site]:
    """The linear and experts sites of a graph in its order, by the node that multiplies."""
    found = ((node, _linear(node)) for node in graph.nodes if node.op == "call_function")
    return {node: site for node, site in found if site is not None}


def _linear(node: fx.Node) -> Site | None:
    name = op(node)
    if name == "linear":
        x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
        return _site(node, x, weight, bias, transposed=False)
    if name == "addmm" and not node.kwargs:
        bias, x, weight = node.args[:3]
        return _site(node, x, weight, bias, transposed=True)
    if name in ("mm", "matmul"):
        return _site(node, node.args[0], node.args[1], None, transposed=True)
    if "mm" in name:
        return _experts(node)
    return None


def _site(node: fx.Node, x: Any, weight: Any, bias: Any, transposed: bool) -> Site | None:
    """The site of a product ``x @ weight`` (transposed) or ``x @ weight.T``, if weight is one."""
    matrix, flipped = parameter_of(weight)
    if matrix is None or not is_tensor(x) or parameter_of(x)[0] is not None:
        return None
    if len(shape(matrix)) == 3:
        return _experts(node)
    if len(shape(matrix)) != 2:
        return None
    turned = transposed != flipped
    vector, _ = parameter_of(bias)
    if bias is None:
        vector, node = _added_bias(node, _sizes(matrix, turned)[0])
    x, y = _outer(x, node)
    nodes = {"x": x, "W": matrix, "y": y}
    if vector is not None:
        nodes["b"] = vector
    return make(nodes, turned)


def make(nodes: Mapping[str, fx.Node], turned: bool, kind: str = "linear", **facts: Any) -> Site:
    """The site whose weight is the node ``W``, ``turned`` if that is (in, out)."""
    matrix = nodes["W"]
    name = str(matrix.target)
    rows, columns = _sizes(matrix, turned)
    about = {"in": columns, "out": rows, "op": op(nodes["y"]), "dtype": matrix.meta["val"].dtype}
    module = name.rpartition(".")[0]
    names = frozenset(("W",) if turned else ())
    return Site(kind, module, None, name, dict(nodes), {**about, **facts}, turned=names)


def _sizes(matrix: fx.Node, turned: bool) -> tuple[int, int]:
    """(out, in) of a weight: its last two sizes."""
    first, second = (int(size) for size in shape(matrix)[-2:])
    return (second, first) if turned else (first, second)


def _added_bias(product: fx.Node, rows: int) -> tuple[fx.Node | None, fx.Node]:
    """A bias that is added to the product right after it, and the sum; else (None, product)."""
    users = list(product.users)
    if len(users) == 1 and op(users[0]) in ("add", "add_"):
        for operand in operands(users[0]):
            vector, _ = parameter_of(operand)
            if vector is not None and tuple(shape(vector)) == (rows,):
                return vector, users[0]
    return None, product


def _outer(x: fx.Node, y: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Give x and y outside of a view to rows and back, where that is all that is done to both."""
    if op(x) not in VIEWS or len(shape(x)) != 2 or len(y.users) != 1:
        return x, y
    wide, back = x.all_input_nodes[0], next(iter(y.users))
    same = op(back) in VIEWS and sizes(back)[:-1] == sizes(wide)[:-1]
    if same and sizes(back)[-1:] == sizes(y)[-1:] and sizes(wide)[-1:] == sizes(x)[-1:]:
        return wide, back
    return x, y


def _experts(node: fx.Node) -> Site | None:
    """The site of a product with one matrix for each expert (3-D weight)."""
    inputs = operands(node)
    for operand in inputs:
        matrix, flipped = parameter_of(operand)
        if matrix is not None and len(shape(matrix)) == 3:
            others = [n for n in inputs if n is not operand and parameter_of(n)[0] is None]
            if not others:
                return None
            nodes = {"x": others[0], "W": matrix, "y": node}
            return make(nodes, not flipped, kind="experts", experts=int(shape(matrix)[0]))
    return None
