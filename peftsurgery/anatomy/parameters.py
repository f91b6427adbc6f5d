"""Convolution and parameter sites: the weights that are neither matrix products nor tables.

conv         y = conv(x, W, b)             W (out, in / groups, *kernel)
parameter    every parameter a program reads, with what it is for
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from peftsurgery.anatomy.flow import Flow
from peftsurgery.anatomy.ops import argument, is_tensor, op, parameter_of, shape
from peftsurgery.anatomy.site import Site
from peftsurgery.capture import TensorInfo


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


def find_parameters(
    flow: Flow, tensors: Mapping[str, TensorInfo], sites: Sequence[Site]
) -> list[Site]:
    """A site for every parameter of a program; the fact ``kind`` says what it is for."""
    uses: dict[str, tuple[str, str]] = {}
    for site in sites:
        kinds = {"W": "weight" if site.kind in ("linear", "conv", "experts") else site.kind}
        kinds["b"] = "bias"
        for name, kind in kinds.items():
            node = site.nodes.get(name)
            if node is not None:
                uses.setdefault(str(node.target), (kind, site.kind))
    found: dict[str, Site] = {}
    for node in flow.nodes:
        name = str(node.target)
        info = tensors.get(name) if node.op == "get_attr" else None
        if info is None or not info.parameter or name in found:
            continue
        kind, owner = uses.get(name) or (_kind(node), "other")
        facts = {"kind": kind, "of": owner, "shape": info.shape, "dtype": info.dtype}
        if info.shape:
            facts |= {"rows": info.shape[0], "columns": info.shape[-1]}
        module = name.rpartition(".")[0]
        found[name] = Site("parameter", module, None, name, {"W": node}, facts)
    return list(found.values())


def _kind(node: fx.Node) -> str:
    """Say bias for a vector that is added to something, else other."""
    users = list(node.users)
    added = users and all(op(user) in ("add", "add_", "sub", "view", "to") for user in users)
    return "bias" if added and len(shape(node)) == 1 else "other"
