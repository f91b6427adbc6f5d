"""Links between sites: which sites an output reaches before another weight or the stream."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from peftsurgery.anatomy.flow import Flow
from peftsurgery.anatomy.site import Site
from peftsurgery.reach import reach

WEIGHTED = ("linear", "embedding", "experts", "conv")
"""The kinds of site that have a weight of their own for a method to change."""
MET = {**dict.fromkeys((*WEIGHTED, "norm", "residual"), ("y",)), "attention": ("scores", "o")}
"""What a value meets a site of each kind at: one of these nodes."""


def find_links(flow: Flow, sites: Iterable[Site]) -> dict[Site, tuple[Site, ...]]:
    """What each site feeds: linears, attention cores, convolutions, norms, residual additions.

    A value is followed through every operator without a weight of its own, through norms and
    attention cores, up to the next linear, convolution or block, or to the sum with the stream.
    """
    known = [site for site in sites if site.kind in MET]
    at: dict[fx.Node, list[Site]] = {}
    for site in known:
        for name in site.nodes.keys() & MET[site.kind]:
            at.setdefault(site.nodes[name], []).append(site)
    ends = {site.nodes["y"] for site in known if site.kind in (*WEIGHTED, "residual")}
    for product, linear in flow.products.items():
        if product is not linear.nodes["y"]:
            at[product] = at.get(linear.nodes["y"], [])
            ends.add(product)

    def stop(node: fx.Node) -> bool:
        return node in ends or node.op == "call_module"

    found: dict[Site, tuple[Site, ...]] = {}
    for site in known:
        if site.kind in (*WEIGHTED, "attention"):
            way = reach(site.nodes[MET[site.kind][-1]].users, lambda node: node.users, stop)
            found[site] = tuple(dict.fromkeys(met for node in way for met in at.get(node, ())))
    return found
