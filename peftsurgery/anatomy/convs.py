"""Convolution sites: y = conv(x, W, b), W (out, in / groups, *kernel)."""

from __future__ import annotations

from torch import fx

from peftsurgery.anatomy.flow import Flow
from peftsurgery.anatomy.ops import argument, is_tensor, op, parameter_of, shape
from peftsurgery.anatomy.site import Site


def find_convs(flow: Flow) -> list[Site]:
    """The convolution sites of a program."""
    return [site for node in flow.nodes if (site := _conv(node)) is not None]


def _conv(node: fx.Node) -> Site | None:
    name = op(node)
    if not name.startswith("conv") or not is_tensor(node):
        return None
    x, weight = node.args[0], parameter_of(argument(node, 1, "weight"))[0]
    if weight is None or not isinstance(x, fx.Node):
        return None
    nodes = {"x": x, "W": weight, "y": node}
    bias, _ = parameter_of(argument(node, 2, "bias"))
    if bias is not None:
        nodes["b"] = bias
    rank = len(shape(weight)) - 2
    transposed = "transpose" in name or (name == "convolution" and argument(node, 6, "transposed"))
    places = {"stride": 3, "padding": 4, "dilation": 5, "groups": 6}
    if name == "convolution":
        places["groups"] = 8
    elif transposed:
        places |= {"groups": 6, "dilation": 7}
    neutral = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    facts = {n: argument(node, place, n, neutral[n]) for n, place in places.items()}
    for key in ("stride", "padding", "dilation"):
        facts[key] = _per_dim(facts[key], rank)
    first, second = (int(size) for size in shape(weight)[:2])
    groups = facts["groups"]
    channels = (first, second * groups) if transposed else (second * groups, first)
    facts |= {"in": channels[0], "out": channels[1], "op": name, "transposed": bool(transposed)}
    facts |= {"kernel": tuple(int(s) for s in shape(weight)[2:]), "rank": rank}
    facts["dtype"] = weight.meta["val"].dtype
    target = str(weight.target)
    return Site("conv", target.rpartition(".")[0], None, target, nodes, facts)


def _per_dim(setting: object, rank: int) -> object:
    """A setting of a convolution for every dim; a padding's name stays a name."""
    if isinstance(setting, str):
        return setting
    values = tuple(setting) if isinstance(setting, (list, tuple)) else (setting,)
    return values * rank if len(values) == 1 else values
