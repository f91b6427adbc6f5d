"""Gates: what the result of a mixer of tokens is multiplied with before its last linear.

    out(o * sigmoid(gate(x)))          whole linears, or rows of one that has queries too
    out(norm(o) * silu(z))             behind a linear attention or a state-space model

A gate is activated, and made of a linear and nothing that mixes tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

from torch import fx

from peftsurgery.anatomy.flow import LIGHT, Flow
from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.site import Site
from peftsurgery.anatomy.values import backward, operands
from peftsurgery.reach import reach

NOTHING: Mapping[fx.Node, Iterable[fx.Node]] = MappingProxyType({})


def gate_rows(
    flow: Flow, results: Iterable[fx.Node], holding: Mapping[fx.Node, Iterable[fx.Node]] = NOTHING
) -> dict[Site, set[int]]:
    """The linears, and their rows, whose activated outputs some results are multiplied with.

    ``holding`` are, for a value that is written into others, those.
    """
    start = list(results)

    def following(node: fx.Node) -> Iterator[fx.Node]:
        yield from (n for n in node.users if has(n, LIGHT))
        yield from (n for n in holding.get(node, ()) if n not in node.users)

    way = set(reach(start, following))
    found: dict[Site, set[int]] = {}
    for node in way.difference(start):
        factors = operands(node)
        if not has(node, Trait.SCALING) or len(factors) != 2 or way.issuperset(factors):
            continue
        gate = next((factor for factor in factors if factor not in way), None)
        linears = NO_SITES if gate is None else flow.origin(gate)
        if gate is None or len(linears) != 1 or not _is_activated(flow, gate):
            continue
        (linear,) = linears
        found.setdefault(linear, set()).update(flow.rows_at(linear, gate))
    return {linear: rows for linear, rows in found.items() if rows}


NO_SITES: frozenset[Site] = frozenset()


def _is_activated(flow: Flow, gate: fx.Node) -> bool:
    """Whether an activation lies between a linear and a value."""
    return any(has(n, Trait.ACTIVATION) for n in backward([gate], lambda n: n in flow.products))
