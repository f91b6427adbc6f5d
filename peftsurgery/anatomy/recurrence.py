"""Roles around a recurrence over tokens: state-space models, and linear attention.

    state space        x, z = in(h);  dt, B, C = x(conv(x));  dt = dt(dt)
                       s_t = exp(A dt_t) s_{t-1} + dt_t B_t x_t;  out(C_t s_t * silu(z_t))
    gated delta net    q, k, v = conv(qkv(h));  q, k of length one
                       S_t = exp(g_t) S_{t-1} (1 - b_t k_t k_t') + b_t v_t k_t';  o(S_t q_t)

Both decay: an exponential of what a linear and a vector of the model's make is on the way from the
stream to the last linear of the branch, and tokens are mixed or taken one by one. In the second,
two values are normed to length one and multiplied: queries and keys, and it is an attention in
kind, with roles attn.q, attn.k, attn.v and attn.o. In the first, what reads the stream is ssm.in
(ssm.gate if it is beside the recurrence alone), what makes the decay's step ssm.dt, what is between
them ssm.x, and the last is ssm.out.
(Gu and Dao, 2023, arXiv:2312.00752; Yang et al., 2024, arXiv:2412.06464.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import fx

from peftsurgery.anatomy.attention import factors
from peftsurgery.anatomy.flow import Flow
from peftsurgery.anatomy.fused_rows import is_depthwise
from peftsurgery.anatomy.gates import gate_rows
from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.residual import Join
from peftsurgery.anatomy.roles import Assignment, role_of, slices
from peftsurgery.anatomy.site import Site
from peftsurgery.anatomy.values import backward, operands, shape
from peftsurgery.capture.schemas import op
from peftsurgery.reach import reach

LINEAR = "linear"
"""The fact ``kind`` of projections of a linear attention."""


def mixes_tokens(flow: Flow, node: fx.Node) -> bool:
    """Whether a node mixes tokens: a convolution over them, or a product of two values."""
    if has(node, Trait.CONV) and len(node.all_input_nodes) > 1:
        weight = shape(node.all_input_nodes[1])
        return len(weight) == 3 and int(weight[-1]) > 1
    is_mixed = has(node, Trait.SCAN) or factors(flow, node) is not None
    return flow.is_signal(node) and is_mixed


def recurrent_roles(flow: Flow, joins: Sequence[Join], taken: Iterable[Site]) -> list[Assignment]:
    """The roles of every branch of a program that has a recurrence in it."""
    known = set(taken)
    streams = frozenset(node for join in joins for node in (join.x, join.y))
    leaves = [*(leaf for join in joins for leaf in join.leaves), *flow.outputs]
    roles: list[Assignment] = []
    for last in dict.fromkeys(site for leaf in leaves for site in flow.origin(leaf) - known):
        branch = _Branch.find(flow, last, streams)
        if branch is not None and not known & branch.linears.keys():
            roles += branch.attention() if len(branch.normed) == 2 else branch.state_space()
    return roles


@dataclass(frozen=True, eq=False)
class _Branch:
    """A branch of the stream with a recurrence: its nodes, its linears and what decays.

    ``linears`` are those before the last, each with whether it reads the stream itself.
    """

    flow: Flow
    last: Site
    nodes: frozenset[fx.Node]
    linears: dict[Site, bool]
    decays: tuple[fx.Node, ...]

    @classmethod
    def find(cls, flow: Flow, last: Site, streams: Collection[fx.Node]) -> _Branch | None:
        start = {*streams, *_entrance(flow, last, streams)}
        found = flow.made_of(last.nodes["x"], start.__contains__)
        nodes = frozenset(found).difference(start)
        ordered = sorted(nodes & flow.products.keys(), key=flow.order.__getitem__)
        sites = [flow.products[n] for n in ordered]
        linears = {site: not _before(flow, site, nodes) for site in sites if site.kind == "linear"}
        decays = tuple(n for n in nodes if op(n) == "exp" and _is_decay(flow, n))
        if not linears or not decays or not any(_passes_on(flow, n) for n in nodes):
            return None
        return cls(flow, last, nodes, linears, decays)

    @property
    def normed(self) -> list[fx.Node]:
        """Values normalised to Euclidean length one."""
        found = {n: None for n in self.nodes if has(n, Trait.SCALING) and _is_normed(n)}
        return sorted(found, key=self.flow.order.__getitem__)

    def attention(self) -> list[Assignment]:
        """The roles of a linear attention; none if its keys or values cannot be told."""
        key = self._key()
        if key is None:
            return []
        query = next(n for n in self.normed if n is not key)
        read = [site for site, is_first in self.linears.items() if is_first]
        convolved, rows = [n for n in self.nodes if is_depthwise(n)], {}
        gates = gate_rows(self.flow, self._results(), self._readers)
        for site in self.linears:
            q, k, v = (self._rows(site, targets) for targets in ([query], [key], convolved))
            first = {"q": q, "k": k, "v": v - q - k} if site in read else {}
            rows[site] = {**first, "gate": gates.get(site, set())}
        if not all(any(found.get(part) for found in rows.values()) for part in "qkv"):
            return []
        roles = [Assignment(self.last, "attn.o", kind=LINEAR)]
        for site, found in rows.items():
            parts = {part: those for part, those in found.items() if those}
            roles += [Assignment(site, role_of(parts), kind=LINEAR)] if parts else []
            if len(parts) > 1:
                roles += [replace(part, kind=LINEAR) for part in slices(site, parts)]
        return roles

    @cached_property
    def _readers(self) -> dict[fx.Node, list[fx.Node]]:
        """What is made of every value, and what it is written into."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in self.nodes:
            for source in self.flow.sources(node):
                found.setdefault(source, []).append(node)
        return found

    def _results(self) -> list[fx.Node]:
        """What is made of mixed tokens, and mixed no more on its way to the last linear."""
        mixing = {n for n in self.nodes if mixes_tokens(self.flow, n) or n in self.decays}
        mixing |= set(self.normed)
        after = set(reach(mixing, lambda node: self._readers.get(node, ())))
        before = set(reach(mixing, self.flow.sources))
        last = before & after
        return [n for n in after - before if not last.isdisjoint(self.flow.sources(n))]

    def state_space(self) -> list[Assignment]:
        """The roles of a state-space model."""
        steps = {site for decay in self.decays for site in _steps(self.flow, decay)}
        roles = [Assignment(self.last, "ssm.out")]
        for site, is_first in self.linears.items():
            if is_first:
                beside = self._is_beside(site)
                roles.append(Assignment(site, "ssm.gate" if beside else "ssm.in"))
            else:
                roles.append(Assignment(site, "ssm.dt" if site in steps else "ssm.x"))
        return roles

    def _rows(self, site: Site, targets: Collection[fx.Node]) -> set[int]:
        """The rows of a linear that arrive at some values."""
        found: set[int] = set()
        for target in targets:
            if site.nodes["y"] in self.flow.between(site.nodes["y"], target):
                found |= self.flow.rows_at(site, target, beside=True)
        return found

    def _key(self) -> fx.Node | None:
        """The key among two normalised values.

        The one multiplied with functions of itself alone.
        """
        normed = set(self.normed)
        of: dict[fx.Node, set[fx.Node]] = {node: {node} for node in normed}
        ordered = sorted(self.nodes - normed, key=self.flow.order.__getitem__)
        is_changed = True
        while is_changed:  # what is written into a value comes after it
            is_changed = False
            for node in ordered:
                found = {n for source in self.flow.sources(node) for n in of.get(source, ())}
                if not found <= of.get(node, set()):
                    of[node] = of.get(node, set()) | found
                    is_changed = True
        for node in ordered:
            pair = factors(self.flow, node) or (operands(node) if op(node) == "mul" else ())
            made = [of.get(factor, set()) for factor in pair]
            if len(made) == 2 and made[0] == made[1] and len(made[0]) == 1:
                return made[0].pop()
        return None

    def _is_beside(self, site: Site) -> bool:
        """Whether a linear gates the recurrence.

        Its activated output multiplies the result alone.
        """
        start = site.nodes["y"]
        way = set(reach([start], lambda node: self.nodes.intersection(node.users))) - {start}
        meets = any(mixes_tokens(self.flow, node) or node in self.decays for node in way)
        return not meets and any(has(node, Trait.ACTIVATION) for node in way)


def _entrance(flow: Flow, last: Site, streams: Collection[fx.Node]) -> list[fx.Node]:
    """The value that a branch reads of its stream, if linears weigh it: several streams are mixed.

    Everything that the branch makes is made of it, and it is not made by linears alone; that tokens
    are not mixed before it tells it from what a recurrence makes.
    """
    end = last.nodes["x"]
    way = set(flow.made_of(end, streams.__contains__))
    read = {site.nodes["x"] for n in way if (site := flow.products.get(n)) is not None}
    for x in sorted(read & way, key=flow.order.__getitem__, reverse=True):
        around = flow.made_of(end, {x, *streams}.__contains__)
        weighed = flow.made_of(x, {*flow.products, *streams}.__contains__)
        is_before = not any(mixes_tokens(flow, n) for n in flow.made_of(x, streams.__contains__))
        if (
            is_before
            and way.intersection(streams, weighed)
            and not way.intersection(streams, around)
        ):
            return [x]
    return []


def _passes_on(flow: Flow, node: fx.Node) -> bool:
    """Whether information passes between tokens, by mixing or by a step-by-step recurrence."""
    if op(node) == "loop_carried":
        return True
    taken = {user.args[1:] for user in node.users if op(user) == "select"}
    return mixes_tokens(flow, node) or len(taken) > 1


def _before(flow: Flow, site: Site, nodes: Collection[fx.Node]) -> list[Site]:
    """The linears of a branch that another's input is computed from."""
    found = flow.made_of(site.nodes["x"], lambda n: n not in nodes or n in flow.products)
    return [flow.products[n] for n in found if n in flow.products and n in nodes]


def _is_decay(flow: Flow, node: fx.Node) -> bool:
    """Whether a node is a learnt decay: exp of a linear's output and a non-matrix parameter."""
    way = flow.upto_weights(node)
    own = any(n.op == "get_attr" and len(shape(n)) <= 2 for n in way)
    return own and bool(_steps(flow, node))


def _steps(flow: Flow, node: fx.Node) -> list[Site]:
    """The linears whose outputs a value is made of."""
    found = flow.made_of(node, lambda n: n in flow.products)
    return [flow.products[n] for n in found if n in flow.products]


def _is_normed(node: fx.Node) -> bool:
    """Whether a node divides a value by its own length."""
    pair = operands(node)
    if len(pair) != 2:
        return False
    value, length = pair if op(pair[1]) != "mul" else pair[::-1]
    if op(node) == "mul" and op(length) != "rsqrt":
        return False
    way = list(backward([length], lambda n: n is value))
    return value in way and any(has(n, Trait.TOTAL) for n in way)
