"""Feed-forward roles: linears of a residual branch around an activation.

    plain    h = down(act(up(x)))
    gated    h = down(act(gate(x)) * up(x))      gate and up may be one fused weight

``down`` is the last linear of a residual branch; an activation lies between it and the linears
before it, and nothing that mixes tokens: no convolution over them, no product of two values. Of
two, or of the two halves of one, the gate is the one that is activated. A classifier or pooler has
an activation too, but its output joins no stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import fx

from peftsurgery.anatomy.flow import Flow
from peftsurgery.anatomy.fused_rows import as_slice
from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.recurrence import mixes_tokens
from peftsurgery.anatomy.residual import Join
from peftsurgery.anatomy.roles import Assignment
from peftsurgery.anatomy.site import Site
from peftsurgery.anatomy.values import operands
from peftsurgery.capture.schemas import op
from peftsurgery.reach import reach


def feedforward_roles(flow: Flow, joins: Sequence[Join], taken: Iterable[Site]) -> list[Assignment]:
    """Which linears are gate, up and down of the residual branches of a program."""
    attention = set(taken)
    roles: list[Assignment] = []
    for join in joins:
        for leaf in join.leaves:
            for down in flow.origin(leaf) - attention:
                roles += branch(flow, down, join.region)
    return roles


def open_roles(flow: Flow, taken: Iterable[Site]) -> list[Assignment]:
    """Find gate, up and down of branches that leave the program before they join a stream.

    Whether they do is for the caller of the block to tell.
    """
    attention = set(taken)
    everything = frozenset(flow.nodes)
    return [
        part
        for node in flow.outputs
        for down in flow.origin(node) - attention
        for part in branch(flow, down, everything)
    ]


def branch(flow: Flow, down: Site, region: frozenset[fx.Node]) -> list[Assignment]:
    """The roles of the branch that ends with ``down``; none if it is no feed-forward."""
    if any(mixes_tokens(flow, node) for node in flow.upto_weights(down.nodes["x"])):
        return []
    reached = _activated(flow, down.nodes["x"])
    products = {site: node for node, site in flow.products.items()}
    if not reached or any(products[site] not in region for site in reached):
        return []
    if len({site.nodes["x"] for site in reached}) != 1:
        return []
    gates = [site for site, ways in reached.items() if True in ways]
    ups = [site for site, ways in reached.items() if ways == {False}]
    roles = []
    if len(gates) == 1 and not ups:
        roles = _single(flow, gates[0], down)
    elif len(gates) == 1 and len(ups) == 1:
        roles = [Assignment(gates[0], "ffn.gate"), Assignment(ups[0], "ffn.up")]
    return [*roles, Assignment(down, "ffn.down")] if roles else []


def _activated(flow: Flow, start: fx.Node) -> dict[Site, set[bool]]:
    """The linears a value is computed from, and whether with or without an activation between."""

    def sources(way: tuple[fx.Node, bool]) -> Iterator[tuple[fx.Node, bool]]:
        node, active = way
        for inner in operands(node):
            yield inner, active or has(node, Trait.ACTIVATION)
            if op(node) == "glu":
                yield inner, False

    made = flow.products | {site.nodes["y"]: site for site in flow.linears}
    stacks: dict[str | None, Site] = {}  # the experts of one stack, in a loop, are one
    found: dict[Site, set[bool]] = {}
    for node, active in reach([(start, False)], sources, lambda way: way[0] in made):
        site = made.get(node)
        if site is not None and site.kind == "experts":
            site = stacks.setdefault(site.parameter, site)
        if site is not None:
            found.setdefault(site, set()).add(active)
    return found


def _single(flow: Flow, linear: Site, down: Site) -> list[Assignment]:
    """The roles of one linear before the activation: an up, or gate and up in one."""
    in_loop = linear.kind == "experts"  # whose outputs are joined, those of all experts
    rows = flow.rows(linear, down.nodes["x"], beside=in_loop)
    if in_loop and rows is not None and not any(rows.values()):
        return []  # that of another expert
    if rows is None or not rows[False] - rows[True]:
        return [Assignment(linear, "ffn.up")]
    whole = linear.facts["out"]
    cut = {"gate": as_slice(rows[True], whole), "up": as_slice(rows[False] - rows[True], whole)}
    roles = [Assignment(linear, "ffn.gate_up")]
    if linear.kind == "linear" and all(cut.values()):
        roles += [Assignment(linear, f"ffn.{n}", (), n, found) for n, found in cut.items()]
    return roles
