"""Links between sites: which sites an output reaches before another weight or the stream."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from peftsurgery.anatomy.flow import Flow
from peftsurgery.anatomy.site import Site
from peftsurgery.reach import reach

SOURCES = ("linear", "embedding", "experts", "conv", "attention")


def find_links(flow: Flow, sites: Iterable[Site]) -> dict[Site, tuple[Site, ...]]:
    """What each site feeds: linears, attention cores, convolutions, norms, residual additions.

    A value is followed through every operator without a weight of its own, through norms and
    attention cores, up to the next linear, convolution or block, or to the sum with the stream.
    """
    known = [site for site in sites if site.kind != "parameter"]
    at: dict[fx.Node, list[Site]] = {}
    ends: set[fx.Node] = set()
    for site in known:
        if site.kind in ("linear", "experts", "conv", "embedding"):
            _note(at, site.nodes["y"], site)
            ends.add(site.nodes["y"])
        elif site.kind == "norm":
            _note(at, site.nodes["y"], site)
        elif site.kind == "attention":
            _note(at, site.nodes.get("scores", site.nodes["o"]), site)
            _note(at, site.nodes["o"], site)
        elif site.kind == "residual":
            _note(at, site.nodes["y"], site)
            ends.add(site.nodes["y"])
    for product, linear in flow.products.items():
        if product is not linear.nodes["y"]:
            at[product] = at.get(linear.nodes["y"], [])
            ends.add(product)
    return {
        site: tuple(_reached(start, at, ends))
        for site in known
        if (start := _start(site)) is not None
    }


def _start(site: Site) -> fx.Node | None:
    if site.kind == "attention":
        return site.nodes["o"]
    return site.nodes.get("y") if site.kind in SOURCES else None


def _note(at: dict[fx.Node, list[Site]], node: fx.Node, site: Site) -> None:
    at.setdefault(node, []).append(site)


def _reached(start: fx.Node, at: dict[fx.Node, list[Site]], ends: set[fx.Node]) -> list[Site]:
    def stop(node: fx.Node) -> bool:
        return node in ends or node.op == "call_module"

    way = reach(start.users, lambda node: node.users, stop)
    return list(dict.fromkeys(site for node in way for site in at.get(node, ())))
