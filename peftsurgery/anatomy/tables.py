"""Embedding, convolution and parameter sites: the weights that are no matrix product.

    embedding    y = W[x]                      x the ids, W (entries, width)
    conv         y = conv(x, W, b)             W (out, in / groups, *kernel)
    parameter    every parameter a program reads, with what it is for

What an embedding embeds is told by where its ids come from. Ids that were counted (an arange, a
cumulative sum) are positions. Of the ids that a model is given, the first are its tokens, and so
are others looked up in a table of the same size; a table with fewer entries than the captured text
has tokens holds types, a longer one positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from ..capture import TensorInfo
from .contents import made_of, plain
from .flow import Flow
from .site import Site
from .values import (
    ADDITION,
    LAYOUT,
    SCALING,
    always,
    argument,
    backward,
    concrete,
    is_tensor,
    never,
    op,
    operands,
    parameter_of,
    shape,
    words,
)

KEEPS_IDS = words(
    """view reshape _unsafe_view flatten unsqueeze squeeze expand contiguous clone to _to_copy slice
    select clamp clamp_min where masked_fill add sub gather index lift_fresh_copy
    broadcast_to alias detach narrow cat roll pad constant_pad_nd copy masked_scatter index_put
    scatter index_copy slice_scatter select_scatter"""
)


def find_embeddings(flow: Flow) -> list[Site]:
    """The embedding sites of a program, with their roles as far as it shows them."""
    sites = []
    for node in flow.nodes:
        if op(node) == "embedding":
            weight, _ = parameter_of(node.args[0])
            ids = node.args[1]
            if weight is not None and isinstance(ids, fx.Node):
                entries, width = (int(size) for size in shape(weight))
                name = str(weight.target)
                facts = {"in": entries, "out": width, "op": "embedding"}
                facts["dtype"] = weight.meta["val"].dtype
                nodes = {"x": ids, "W": weight, "y": node}
                module = name.rpartition(".")[0]
                sites.append(Site("embedding", module, None, name, nodes, facts))
    return _with_roles(flow, sites)


def _with_roles(flow: Flow, sites: Sequence[Site]) -> list[Site]:
    sources = {site: given_ids(site.nodes["x"]) for site in sites}
    order = [n for n in flow.nodes if n.op == "placeholder"]
    given = [n for n in order if any(source is n for source in sources.values())]
    first = next((site for site in sites if given and sources[site] is given[0]), None)
    sums = {site: _sums(site.nodes["y"]) for site in sites}

    def is_of_another_text(site: Site) -> bool:
        """Whether a table is the largest of those added up that have ids of their own."""
        together = [other for other in sites if sums[other] & sums[site] and sources[other]]
        return first not in together and site is max(together, key=lambda s: int(s.facts["in"]))

    def role(site: Site) -> str:
        source = sources[site]
        entries = site.facts["in"]
        if source is None or source.op != "placeholder" or first is None:
            counts = is_counted(site.nodes["x"])
            alike = first is not None and entries == first.facts["in"]
            if alike and not counts and not is_held(site.nodes["x"]):
                return "embed.tokens"  # shifted labels
            return "embed.positions" if counts or entries >= _tokens(site) else "embed.types"
        if source is given[0] or entries == first.facts["in"] or is_of_another_text(site):
            return "embed.tokens"
        return "embed.positions" if entries >= _tokens(site) else "embed.types"

    return [replace(site, role=role(site)) for site in sites]


def _sums(y: fx.Node) -> set[fx.Node]:
    """An embedding, and all that it is scaled and added to before anything else is done to it."""
    found, stack = {y}, [y]
    while stack:
        for user in stack.pop().users:
            if op(user) in LAYOUT | SCALING | ADDITION and user not in found:
                found.add(user)
                stack.append(user)
    return found


def is_counted(node: fx.Node) -> bool:
    """Whether ids are made of an arange or a cumulative sum; what is picked by position is not."""
    return any(op(found) in ("arange", "cumsum") for found in made_of(node, always))


def is_held(node: fx.Node) -> bool:
    """Whether a value is a tensor that the model holds, viewed or picked from at most."""
    ends = [n for n in backward([node], never) if not operands(n)]
    return bool(ends) and all(n.op == "get_attr" for n in ends)


def _tokens(site: Site) -> int:
    """How many tokens a text of the captured example has."""
    sizes = shape(site.nodes["x"])
    return concrete(sizes[-1]) if sizes else 1


def given_ids(node: fx.Node) -> fx.Node | None:
    """The input that ids are, before they are viewed, shifted, filled in or picked from."""
    for found in made_of(node, lambda n: plain(n) in KEEPS_IDS):
        if found.op == "placeholder" and is_tensor(found):
            return found
    return None


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
        module = name.rpartition(".")[0]
        found[name] = Site("parameter", module, None, name, {"W": node}, facts)
    return list(found.values())


def _kind(node: fx.Node) -> str:
    """Say bias for a vector that is added to something, else other."""
    users = list(node.users)
    added = users and all(op(user) in ("add", "add_", "sub", "view", "to") for user in users)
    return "bias" if added and len(shape(node)) == 1 else "other"
