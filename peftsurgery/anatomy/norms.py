"""Norm sites: layer norm and its kin as one operator, and RMS norms spelled out.

    y = layer_norm(x, W, b)          rms_norm, group_norm and batch_norm alike
    y = W * (x * rsqrt(mean(x^2) + eps))       with casts in between, and (1 + W) for W in some

Bindings: ``x``, ``y``, and ``W`` and ``b`` where there are any. Facts: ``eps`` (None if
the operator does not say), and ``width`` where it is fixed: that of an image may vary.
"""

from __future__ import annotations

from torch import fx

from peftsurgery.anatomy.flow import Flow
from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.site import Site
from peftsurgery.anatomy.values import backward, fixed_width, operands, parameter_of, strip, value
from peftsurgery.capture.schemas import arguments, op


def find_norms(flow: Flow) -> list[Site]:
    """The norm sites of a program."""
    found = (_single(node) or _spelled(node) for node in flow.nodes)
    return [site for site in found if site is not None]


def _single(node: fx.Node) -> Site | None:
    if not has(node, Trait.NORM):
        return None
    given = arguments(node)
    nodes = {"x": operands(node)[0], "y": node}
    for name, label in (("W", "weight"), ("b", "bias")):
        vector, _ = parameter_of(given.get(label))
        if vector is not None:
            nodes[name] = vector
    return _site(nodes, op(node), given["eps"])


def _spelled(node: fx.Node) -> Site | None:
    """The RMS norm whose reciprocal root is ``node``."""
    if op(node) != "rsqrt":
        return None
    products = [user for user in node.users if op(user) == "mul"]
    way = backward([node], lambda n: op(n) == "mean")
    if len(products) != 1 or not any(op(n) == "mean" for n in way):
        return None
    scaled = products[0]
    x = next((n for n in operands(scaled) if n is not node), None)
    if x is None:
        return None
    y, weight = scaled, None
    while len(y.users) == 1 and weight is None:
        after = next(iter(y.users))
        if op(after) == "mul":
            weight = next((w for n in operands(after) if (w := _scale(n)) is not None), None)
        if weight is None and not has(after, Trait.CAST):
            break
        y = after
    nodes = {"x": strip(x, Trait.CAST), "y": y}
    if weight is not None:
        nodes["W"] = weight
        y = next(iter(y.users)) if _is_cast_back(y, nodes["x"]) else y
        nodes["y"] = y
    inner = node.all_input_nodes[0]
    added = arguments(inner).get("other")
    return _site(nodes, "rms_norm", added if isinstance(added, float) else None)


def _is_cast_back(y: fx.Node, x: fx.Node) -> bool:
    """Whether the only use of ``y`` is a cast to the dtype that ``x`` has."""
    if len(y.users) != 1:
        return False
    after = next(iter(y.users))
    return has(after, Trait.CAST) and value(after).dtype == value(x).dtype


def _scale(node: fx.Node) -> fx.Node | None:
    """The parameter of a factor W or 1 + W."""
    inner = strip(node, Trait.CAST)
    if op(inner) == "add" and len(operands(inner)) == 1:
        inner = operands(inner)[0]
    return parameter_of(inner)[0]


def _site(nodes: dict[str, fx.Node], name: str, eps: float | None) -> Site:
    weight = nodes.get("W")
    target = None if weight is None else str(weight.target)
    module = "" if target is None else target.rpartition(".")[0]
    facts = {"op": name, "eps": eps, "dtype": value(nodes["x"]).dtype, **fixed_width(nodes["x"])}
    return Site("norm", module, None, target, nodes, facts)
