"""Feeders: the projections that the operands of an attention core are made of.

    q = rotate(norm(linear(x)))             one: the origin of the operand
    q = linear(x) + linear(positions)       several that are added up are all its projections
    q = mix(cat(a, b)) + a + repeat(b)      a: b is repeated here, for the heads that share it
    k = mix(cat(a, b)) + mean(a) + b        b: a is averaged here

In the last, convolutions in groups mix what is a head's (Figliolia et al., 2025, arXiv:2510.04476).
A linear that is in the sums of several operands is a projection of the one that has each of its
rows in the fewest places.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from peftsurgery.anatomy.attention import Core
from peftsurgery.anatomy.flow import Flow
from peftsurgery.anatomy.fused_rows import is_grouped
from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.site import Site
from peftsurgery.anatomy.values import backward, samples
from peftsurgery.capture.schemas import op

PARTS = ("q", "k", "v")
"""The operands of a core."""


def feeders_of(flow: Flow, core: Core) -> dict[str, list[Site]]:
    """The linears that each operand of a core is made of, in the program's order."""
    found = {
        part: frozenset[Site]().union(*(_projections(flow, n) for n in core.operands(part)))
        for part in PARTS
    }
    found = {part: sites - _elsewhere(flow, core, part, found) for part, sites in found.items()}
    return {
        part: sorted(sites, key=lambda s: flow.order[s.nodes["y"]]) for part, sites in found.items()
    }


def _projections(flow: Flow, operand: fx.Node) -> frozenset[Site]:
    """The linears that an operand of a core is made of.

    Several where they are added up, or where what another layer made is added to one: values of
    the first layer, embeddings of positions. Not those of a stream that linears read.
    """
    found = flow.origin(operand)
    if found:
        return found
    way = list(backward([operand], lambda node: node in flow.products))
    is_sum = all(
        node in flow.products or (node not in flow.by_input and not _is_lost(node)) for node in way
    )
    return frozenset(flow.products[n] for n in way if n in flow.products) if is_sum else found


def _is_lost(node: fx.Node) -> bool:
    """Whether what goes into a value cannot be told from it: neither a table's rows nor a sum."""
    is_opaque = has(node, Trait.OPAQUE) and op(node) != "embedding" and not is_grouped(node)
    return node.op == "call_module" or is_opaque


def _elsewhere(
    flow: Flow, core: Core, part: str, found: Mapping[str, frozenset[Site]]
) -> frozenset[Site]:
    """The linears in the sum that an operand is, which are projections of another operand."""
    sums = [p for p, operand in _whole(core).items() if not flow.origin(operand)]
    if part not in sums:
        return frozenset()
    taken = set()
    for site in found[part]:
        counts = {p: _places(flow, core, site, p) for p in sums if site in found[p]}
        fewest = min(filter(None, counts.values()), default=counts[part])
        if counts[part] != fewest:
            taken.add(site)
    return frozenset(taken)


def _places(flow: Flow, core: Core, site: Site, part: str) -> float:
    """In how many entries of an operand's token a row of a linear is, but for a factor.

    The factor is the same for all operands. 0 if the rows are in none, or cannot be followed.
    """
    operand = _whole(core)[part]
    tokens = samples(operand)[-1 if part in core.turned else -2]
    return flow.entries_of_a_row(site, operand) / tokens


def _whole(core: Core) -> dict[str, fx.Node]:
    """The operands of a core by part; keys and values before they are repeated for heads."""
    k, v = core.shared
    return {"q": core.q, "k": k, "v": v}
