"""Linear sites: wherever a signal is multiplied by a weight matrix, however it is spelled.

    linear(x, W, b)                 W is (out, in)
    addmm(b, x, W), mm(x, W)        W is (in, out)          it is ``turned``
    matmul(x, W.T) + b              W is (out, in) again
    matmul(W, x.T), mv(W, x)        x and y are ``turned``, but for vectors
    inner(x, W), tensordot(x, W)    W is (out, in), or (in, out)
    einsum("btd,od->bto", x, W)     any order of axes in which x and y are as above, or turned;
                                    what has more axes is brought to this (capture.contractions)
    bmm(x, W.expand(...))           W is (in, out): a matrix for all of a batch is one
    linear(x, W[8:24], b[8:24])     the site has those rows of W and b for its ``slice``
    linear(x, W * g)                W is computed of parameters alone (:mod:`.made_weights`)

Bindings: ``x`` (..., in), ``W`` the raw ``get_attr`` or what computes it, ``b`` a bias if any,
``y`` (..., out) with the leading sizes of ``x``, so that ``y + linear(linear(x, A), B)`` is right
at ``y``. Where an addmm works on rows flattened by a view and its result is viewed back, x and y
are the outer values.
What is ``turned`` has its last two axes exchanged: x (..., in, n), y (..., out, n).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from peftsurgery.anatomy.made_weights import MadeWeights, module_of
from peftsurgery.anatomy.ops import Trait, has, meaning
from peftsurgery.anatomy.site import Site
from peftsurgery.anatomy.values import (
    is_swap,
    is_tensor,
    operands,
    parameter_of,
    shape,
    sizes,
    strip,
    value,
)
from peftsurgery.anatomy.weight_rows import WeightRows, part_of
from peftsurgery.capture.schemas import op


def find_linears(graph: fx.Graph, parameters: Collection[str]) -> dict[fx.Node, Site]:
    """The linear sites of a graph in its order, by the node that multiplies.

    A product with a tensor that is none of the ``parameters`` is arithmetic.
    """
    made = MadeWeights(parameters)
    found: dict[fx.Node, Site] = {}
    for node in graph.nodes:
        site = _linear(node, made) if node.op == "call_function" else None
        if site is not None and site.parameter in parameters:
            found[node] = site
        else:
            made.note(node)
    return found


@dataclass(frozen=True)
class _Product:
    """A product ``y = x @ W.T``: whose operands are held with their last two axes exchanged."""

    x: Any
    weight: Any
    bias: Any = None
    turned: frozenset[str] = frozenset()


def _linear(node: fx.Node, made: MadeWeights) -> Site | None:
    product = _product(node, made)
    if product is not None and is_tensor(product.x) and _may_be_x(node, product.x, made):
        matrix, flipped = matrix_of(product.weight, made)
        if matrix is not None and len(shape(matrix)) == 2:
            return _site(node, product, matrix, flipped, made)
        part = part_of(product.weight, 1 if "W" in product.turned else 0)
        if part is not None:
            return _part_site(node, product, part)
    return None


def _may_be_x(product: fx.Node, factor: fx.Node, made: MadeWeights) -> bool:
    """Whether a factor is no matrix of weights: learned queries are repeated for all of a batch.

    The operator itself says which of its operands is the weight, or it is the one that is learned.
    """
    if made.of(factor):
        return False
    matrix, _ = matrix_of(factor)
    is_said = op(product) == "linear"
    return matrix is None or len(shape(factor)) > 2 or (is_said and factor.op == "get_attr")


def _product(node: fx.Node, made: MadeWeights) -> _Product | None:
    """An operator's operands by what they are in a product with a weight, if it is one."""
    if op(node) == "tensordot":
        return _tensordot(*node.args)
    if op(node) == "einsum":
        return _einsum(made, *node.args)
    known = meaning(node)
    if not known.operands or node.kwargs:  # a bias and a product that are scaled
        return None
    x, weight, *bias = (node.args[i] for i in known.operands if i < len(node.args))
    if not bias and known.turned and _comes_first(x, weight, made):
        is_vector = len(getattr(value(weight), "shape", ())) == 1
        return _Product(weight, x, turned=frozenset("" if is_vector else "xy"))
    return _Product(x, weight, bias[0] if bias else None, frozenset("W" if known.turned else ""))


def _comes_first(first: Any, second: Any, made: MadeWeights) -> bool:
    """Whether the first factor of a product is the weight, and the second the signal."""
    matrix = matrix_of(first, made)[0]
    return matrix is not None and (matrix.op == "get_attr" or matrix_of(second, made)[0] is None)


def _tensordot(x: Any, weight: Any, of_x: Any = None, of_weight: Any = None) -> _Product | None:
    """A sum over the last axis of x and one of the weight."""
    if not is_tensor(x) or not is_tensor(weight) or len(shape(weight)) != 2:
        return None
    pair = [list(dims) if isinstance(dims, (list, tuple)) else [] for dims in (of_x, of_weight)]
    if [dim % len(shape(x)) for dim in pair[0]] != [len(shape(x)) - 1] or len(pair[1]) != 1:
        return None
    return _Product(x, weight, turned=frozenset("" if pair[1][0] % 2 else "W"))


def _einsum(made: MadeWeights, equation: Any, factors: Any, *path: Any) -> _Product | None:
    """A sum over the axis that x and a matrix share, if the other axes stay in order."""
    texts, _, result = str(equation).replace(" ", "").replace("...", "?").partition("->")
    axes = texts.split(",")
    if not result or len(axes) != 2 or len(factors) != 2:
        return None
    index = next((i for i in (0, 1) if matrix_of(factors[i], made)[0]), None)
    if index is None or len(axes[index]) != 2:
        return None
    weight, given = axes[index], axes[1 - index]
    within, out = sorted(weight, key=lambda axis: axis in result)
    if within in result or within not in given or out in given or out not in result:
        return None
    around = given.replace(within, "")
    turned = {"W"} if weight == within + out else set()
    for name, found, axis in (("x", given, within), ("y", result, out)):
        if found == around[:-1] + axis + around[-1:] and around[-1:] not in ("", "?"):
            turned.add(name)
        elif found != around + axis:
            return None
    return _Product(factors[1 - index], factors[index], turned=frozenset(turned))


def matrix_of(node: Any, made: MadeWeights | None = None) -> tuple[fx.Node | None, bool]:
    """The parameter that a weight operand is, and whether it was transposed on the way.

    One matrix for all of a batch, with a leading axis that it is repeated along, is that matrix.
    Where ``made`` is given, one that parameters make is a weight too.
    """
    while isinstance(node, fx.Node) and (has(node, Trait.EXPANSION) or op(node) == "unsqueeze"):
        source = node.all_input_nodes[0]
        if sizes(source)[-2:] != sizes(node)[-2:] or len(shape(source)) < 2:
            return None, False
        if any(size != 1 for size in sizes(source)[:-2]):
            return None, False
        node = source
    found = parameter_of(node)
    if found[0] is None and made is not None and part_of(node, 0) is None:
        inner = strip(node, Trait.CAST)
        if is_swap(inner) and made.of(inner.all_input_nodes[0]):
            return inner.all_input_nodes[0], True
        return (node, False) if made.of(node) else (None, False)
    return found


def _site(
    node: fx.Node, product: _Product, matrix: fx.Node, flipped: bool, made: MadeWeights
) -> Site:
    """The site of a product with a matrix, which is transposed on its way there if ``flipped``."""
    multiplies = node
    turned = product.turned ^ frozenset("W" if flipped else "")
    rows = _out_in(matrix, "W" in turned)[0]
    vector, _ = parameter_of(product.bias)
    if product.bias is None:
        vector, node = _added_bias(node, rows, "y" in turned)
    x, y = (product.x, node) if turned & {"x", "y"} else _outer(product.x, node)
    nodes = {"x": x, "W": matrix, "y": y}
    if vector is None and is_tensor(product.bias):
        vector = product.bias  # it is computed: whoever folds a bias is to know that there is one
    if vector is not None:
        nodes["b"] = vector
    sources = tuple(str(source.target) for source in made.of(matrix))
    if not sources:
        return make(nodes, turned)
    whole = make(nodes, turned, made_of=sources)
    return replace(whole, parameter=sources[0], module=module_of(multiplies, sources[0]))


def _part_site(node: fx.Node, product: _Product, part: WeightRows) -> Site | None:
    """The site of a product with some rows of a matrix, and with those of its bias if it has one.

    None if the bias is another tensor's: what is a whole there and a part here is no one site.
    """
    nodes = {"W": part.parameter, "y": node, "x": product.x}
    if product.bias is not None:
        bias = part_of(product.bias, 0)
        if bias is None or bias.rows != part.rows:
            return None
        nodes["b"] = bias.parameter
    turned = product.turned ^ frozenset("W" if part.flipped else "")
    if not turned & {"x", "y"}:
        nodes["x"], nodes["y"] = _outer(product.x, node)
    whole = make(nodes, turned, out=part.rows.rows)
    last = part.rows.start + part.rows.length
    return replace(whole, slice=part.rows, label=f"{part.rows.start}_{last}")


def make(
    nodes: Mapping[str, fx.Node], turned: frozenset[str], kind: str = "linear", **facts: Any
) -> Site:
    """The site whose weight is the node ``W``, which is (in, out) if it is ``turned``."""
    matrix = nodes["W"]
    name = str(matrix.target)
    rows, columns = _out_in(matrix, "W" in turned)
    about = {"in": columns, "out": rows, "op": op(nodes["y"]), "dtype": matrix.meta["val"].dtype}
    module = name.rpartition(".")[0]
    return Site(kind, module, None, name, dict(nodes), {**about, **facts}, turned=turned)


def _out_in(matrix: fx.Node, turned: bool) -> tuple[int, int]:
    """(out, in) of a weight: its last two sizes."""
    first, second = (int(size) for size in shape(matrix)[-2:])
    return (second, first) if turned else (first, second)


def _added_bias(product: fx.Node, rows: int, is_turned: bool) -> tuple[fx.Node | None, fx.Node]:
    """A bias that is added to the product right after it, and the sum; else (None, product).

    Beside a product that is turned it is a column.
    """
    users = list(product.users)
    if len(users) == 1 and op(users[0]) == "add":
        for operand in operands(users[0]):
            is_column = sizes(operand) == (rows, 1)
            inner = operand.all_input_nodes[0] if is_turned and is_column else operand
            vector, _ = parameter_of(inner if operand.op != "get_attr" else operand)
            if is_column == is_turned and vector is not None and sizes(vector) == (rows,):
                return vector, users[0]
    return None, product


def _outer(x: fx.Node, y: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Replace x and y by the values outside a flatten/unflatten pair around the product."""
    if not has(x, Trait.RESHAPE) or len(shape(x)) != 2 or len(y.users) != 1:
        return x, y
    wide, back = x.all_input_nodes[0], next(iter(y.users))
    same = has(back, Trait.RESHAPE) and sizes(back)[:-1] == sizes(wide)[:-1]
    if same and sizes(back)[-1:] == sizes(y)[-1:] and sizes(wide)[-1:] == sizes(x)[-1:]:
        return wide, back
    return x, y
