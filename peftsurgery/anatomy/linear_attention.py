"""Roles around attention without a softmax: scores meet values as they are.

    o = (f(q k') * D) v + (q * d) S     D and d are of positions alone, S is made of keys and values

A product of two projections meets a third, with nothing on its way but what is done to every score
by itself (f: a power, an angle, an activation) and what the model has of itself: masks, decays,
scales. Queries may also be multiplied with what earlier keys and values made. Or there is one score
for each token, and no product of matrices:

    o = sum(softmax(q) * k) * v         q has one row, the sum is over the tokens

The projections have the fact ``kind`` linear, and there is no core that rules could call.
(Katharopoulos et al., 2020, arXiv:2006.16236; Qin et al., 2024, arXiv:2401.04658; Mehta and
Rastegari, 2022, arXiv:2206.02680; Zeng et al., 2021, arXiv:2111.09714.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from torch import fx

from peftsurgery.anatomy.attention import TOUCHES, Core, factors, projections_out, weighted_sum
from peftsurgery.anatomy.flow import Flow, forward
from peftsurgery.anatomy.gates import gate_rows
from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.recurrence import LINEAR
from peftsurgery.anatomy.roles import Assignment, role_of, slices
from peftsurgery.anatomy.site import Site
from peftsurgery.anatomy.values import operands
from peftsurgery.reach import reach

Rows = dict[Site, dict[str, set[int]]]


def linear_attention_roles(flow: Flow, taken: Iterable[Site]) -> list[Assignment]:
    """The roles of projections whose products meet values without a softmax."""
    known = set(taken)
    cores = [core for node in flow.nodes for core in _cores(flow, node, known)]
    rows: Rows = {}
    last: dict[Site, None] = {}
    for core in cores:
        results = _results(flow, core)
        outs = projections_out(flow, core, results)
        if len(outs) != 1 or outs[0] in known:
            continue
        last[outs[0]] = None
        for part, node in (("q", core.q), ("k", core.k), ("v", core.v)):
            (linear,) = flow.origin(node)
            rows.setdefault(linear, {}).setdefault(part, set()).update(flow.rows_at(linear, node))
        for linear, gates in gate_rows(flow, _sums(results)).items():
            rows.setdefault(linear, {}).setdefault("gate", set()).update(gates)
    return [*_assigned(rows), *(Assignment(out, "attn.o", kind=LINEAR) for out in last)]


def _cores(flow: Flow, node: fx.Node, known: set[Site]) -> Iterator[Core]:
    """The core that begins at a node, if each of its parts is made by rows of its own."""
    for core in (_of_products(flow, node), _of_one_score(node)):
        if core is not None and _is_apart(flow, core, known):
            yield core


def _of_products(flow: Flow, node: fx.Node) -> Core | None:
    """The core of a product of queries and keys, if its result is multiplied with values."""
    pair = factors(flow, node)
    found = None if pair is None else weighted_sum(flow, node, TOUCHES | Trait.POINTWISE)
    if pair is None or found is None or found[1].args[0] is found[2]:
        return None
    return Core(pair[0], pair[1], found[2], found[1], None, frozenset("k"), None, scores=node)


def _of_one_score(softmax: fx.Node) -> Core | None:
    """The core of a softmax that weighs keys, if their sum is multiplied with values."""
    if not has(softmax, Trait.SOFTMAX):
        return None
    for weighed, k in _multiplied([softmax], TOUCHES):
        totals = [n for n in forward([weighed], Trait.CAST | Trait.TOTAL) if has(n, Trait.TOTAL)]
        for o, v in _multiplied(totals, Trait.LAYOUT):
            q = softmax.all_input_nodes[0]
            return Core(q, k, v, o, None, frozenset(), None, softmax=softmax)
    return None


def _multiplied(start: Iterable[fx.Node], through: Trait) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Products, entry by entry, of values and others; each with its other factor."""
    for node in forward(start, through):
        for user in node.users:
            pair = operands(user)
            if has(user, Trait.SCALING) and len(pair) == 2 and pair[0] is not pair[1]:
                yield user, pair[1] if pair[0] is node else pair[0]


def _is_apart(flow: Flow, core: Core, known: set[Site]) -> bool:
    """Whether queries, keys and values are made by linears without a role, or by different rows."""
    parts = (core.q, core.k, core.v)
    linears = [flow.origin(part) for part in parts]
    if any(len(origin) != 1 or not known.isdisjoint(origin) for origin in linears):
        return False
    rows = [
        (linear, flow.rows_at(linear, part))
        for origin, part in zip(linears, parts, strict=True)
        for linear in origin
    ]
    return all(
        one[1] and (one[0] is not other[0] or one[1].isdisjoint(other[1]))
        for one, other in ((rows[0], rows[1]), (rows[1], rows[2]), (rows[2], rows[0]))
    )


def _results(flow: Flow, core: Core) -> list[fx.Node]:
    """What a core returns, and the products of its queries that are added to it."""
    queries = flow.origin(core.q)
    return [core.o] + [
        node
        for node in flow.nodes
        if node not in (core.o, core.scores)
        and (pair := factors(flow, node)) is not None
        and flow.origin(pair[0]) == queries
    ]


def _sums(results: Sequence[fx.Node]) -> list[fx.Node]:
    """Results and what they are added up to."""

    def added(node: fx.Node) -> Iterator[fx.Node]:
        return (n for n in node.users if has(n, Trait.ADDITION))

    found = list(reach(results, added))
    return [n for n in found if n in results or set(operands(n)) <= set(found)]


def _assigned(rows: Rows) -> list[Assignment]:
    roles: list[Assignment] = []
    for linear, parts in rows.items():
        roles.append(Assignment(linear, role_of(parts), kind=LINEAR))
        if len(parts) > 1:
            roles += [replace(part, kind=LINEAR) for part in slices(linear, parts)]
    return roles
