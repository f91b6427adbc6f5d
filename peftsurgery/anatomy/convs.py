"""Convolution sites: y = conv(x, W, b), W (out, in / groups, *kernel)."""

from __future__ import annotations

from torch import fx

from peftsurgery.anatomy.flow import Flow
from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.site import Site
from peftsurgery.anatomy.values import is_tensor, parameter_of, shape
from peftsurgery.capture.schemas import arguments, op


def find_convs(flow: Flow) -> list[Site]:
    """The convolution sites of a program."""
    return [site for node in flow.nodes if (site := _conv(node)) is not None]


def _conv(node: fx.Node) -> Site | None:
    if not has(node, Trait.CONV) or not is_tensor(node):
        return None
    given = arguments(node)
    x, weight = given["input"], parameter_of(given["weight"])[0]
    if weight is None or not isinstance(x, fx.Node):
        return None
    nodes = {"x": x, "W": weight, "y": node}
    bias, _ = parameter_of(given["bias"])
    if bias is not None:
        nodes["b"] = bias
    rank = len(shape(weight)) - 2
    transposed = bool(given.get("transposed", "output_padding" in given))
    facts = {n: _per_dim(given[n], rank) for n in ("stride", "padding", "dilation")}
    first, second = (int(size) for size in shape(weight)[:2])
    groups = facts["groups"] = given["groups"]
    channels = (first, second * groups) if transposed else (second * groups, first)
    facts |= {"in": channels[0], "out": channels[1], "op": op(node), "transposed": transposed}
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
