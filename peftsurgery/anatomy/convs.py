"""Convolution sites: y = conv(x, W, b), W (out, in / groups, *kernel).

One of a single tap, a stride of one and one group multiplies every place of an image, or every
token, with a matrix: a linear. Its x and y are (batch, in, ...) and (batch, out, ...), and W is
(out, in, 1, ...); the fact ``pointwise`` has the number of the axes behind. A program has such a
linear as a site where it has a role, beside the convolution; only rules that ask for roles take it.
One of a single tap in several groups is a projection too, but no linear: it is the convolution that
has the role (SqueezeBERT, Iandola et al., 2020, arXiv:2006.11316).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import fx

from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.site import Site
from peftsurgery.anatomy.values import is_tensor, parameter_of, shape
from peftsurgery.capture.schemas import arguments, op


def find_convs(nodes: Iterable[fx.Node]) -> list[Site]:
    """The convolution sites of a program."""
    return [site for node in nodes if (site := _conv(node)) is not None]


def find_pointwise(nodes: Iterable[fx.Node], parameters: Collection[str]) -> dict[fx.Node, Site]:
    """The linears that convolutions of a program are, by the node that multiplies.

    Of those in groups, the convolutions.
    """
    found = {site.nodes["y"]: site for site in find_convs(nodes)}
    return {
        node: _as_linear(site) if site.facts["groups"] == 1 else site
        for node, site in found.items()
        if site.parameter in parameters and _is_pointwise(site)
    }


def _is_pointwise(site: Site) -> bool:
    facts, rank = site.facts, site.facts["rank"]
    mixes = facts["groups"] == 1 or facts["in"] > facts["groups"]  # channels with others
    is_plain = mixes and not facts["transposed"]
    is_here = facts["kernel"] == facts["stride"] == (1,) * rank
    unpadded = facts["padding"] in ((0,) * rank, "same", "valid")
    return is_plain and is_here and unpadded and len(shape(site.nodes["x"])) == rank + 2


def _as_linear(site: Site) -> Site:
    facts = {name: site.facts[name] for name in ("in", "out", "op", "dtype")}
    facts["pointwise"] = site.facts["rank"]
    return Site("linear", site.module, None, site.parameter, site.nodes, facts)


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
