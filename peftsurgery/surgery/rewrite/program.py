"""Rewriting of one program: its graph copied node by node, some values in other values' place.

A cut gives new values. One that takes a value's place for all who read it (a site's result, a
parameter) is made as soon as that value is there; one that only its site reads instead (its x, its
W) is made before the first node that reads it on the way to what the site computes. From there on
nodes are copied with the new value, so later cuts are made of what earlier ones made.

A rule's text is read over fx proxies: evaluating it appends nodes to the new graph. They keep the
origin of the node that they serve, and carry ``meta["surgery"]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer

from peftsurgery.anatomy import analyse
from peftsurgery.anatomy.site import features_dim
from peftsurgery.capture import Program
from peftsurgery.capture.module_calls import take_place
from peftsurgery.capture.names import join
from peftsurgery.capture.stack import inherit
from peftsurgery.errors import SurgeryError
from peftsurgery.language.evaluation import Context
from peftsurgery.language.readings import fold, rewrite
from peftsurgery.surgery.plan.cut import Cut
from peftsurgery.surgery.rewrite.dtypes import cast, compute_dtype, dtype_of, is_float
from peftsurgery.surgery.rewrite.environment import ValueDomain, environment
from peftsurgery.surgery.rewrite.layout import as_held, disorient
from peftsurgery.surgery.rewrite.rerun import calls_for_more, find_region
from peftsurgery.surgery.rewrite.site_functions import Replay

Make = Callable[[], None]
Spot = tuple[fx.Node | None, fx.Node | None]


@dataclass(frozen=True)
class Values:
    """What stands for the nodes of a program so far, in the new graph.

    ``everywhere`` for all who read a node; ``there`` for one reader alone, by node and reader;
    ``kept`` for the later cuts of a site alone, by node and the site's result: weights as cuts have
    folded into them, the operands of a core that was run again.
    """

    everywhere: MutableMapping[fx.Node, fx.Node] = field(default_factory=dict)
    there: MutableMapping[tuple[fx.Node, fx.Node], fx.Node] = field(default_factory=dict)
    kept: dict[Spot, fx.Node] = field(default_factory=dict)

    def read(self, source: fx.Node, reader: fx.Node) -> fx.Node:
        """The value of a node, as one of its readers sees it."""
        return self.there.get((source, reader)) or self.everywhere[source]

    def put(self, source: fx.Node, readers: Iterable[fx.Node], new: fx.Node) -> None:
        """Put a value in a node's place, for some readers or, if none are named, for all."""
        if not readers:
            self.everywhere[source] = new
        self.there.update({(source, reader): new for reader in readers})


@dataclass(frozen=True)
class Replacement:
    """One new value of a cut: for ``readers`` of the node alone, or for all of them if empty."""

    cut: Cut
    name: str
    node: fx.Node
    readers: tuple[fx.Node, ...]

    @property
    def origin(self) -> fx.Node:
        """The node that the new value serves: the first that reads it, or the one it replaces."""
        return self.readers[0] if self.readers else self.node


class Walk:
    """Copies a program's graph once, from its inputs to its output, and makes cuts on the way."""

    def __init__(self, program: Program) -> None:
        self.program, self.graph = program, fx.Graph()
        self.values = Values()
        self.order = {node: number for number, node in enumerate(program.graph.nodes)}
        self.before: dict[fx.Node, dict[tuple[int, Any, Any], list[Make]]] = {}
        self.after: dict[fx.Node, list[Make]] = {}
        self.calls: dict[fx.Node, tuple[Any, Any]] = {}
        self.rerun: set[str] = set()
        self.first: dict[Any, fx.Node] = {}
        for node in reversed(program.graph.find_nodes(op="get_attr")):
            self.first[node.target] = node

    def merged(self, node: fx.Node) -> fx.Node:
        """The first node that reads the same tensor: it stands for all that do; else the node."""
        return self.first[node.target] if node.op == "get_attr" else node

    def plan(self, cut: Cut) -> None:
        """Say where a cut's new values are made. PSG305 if the site is not made of one.

        Later cuts of one input of a site are made first, as their folds have it: once a fold has
        made W do what f did to x, the next cut's x goes through f too.
        """
        nodes = {name: self.merged(cut.site.nodes[name]) for name in cut.rule.rewrite}
        names = sorted(nodes, key=lambda name: self.order[nodes[name]])
        for name in names:
            change = Replacement(cut, name, nodes[name], self.readers(cut, name))
            make = partial(self.make, change, is_last=name == names[-1])
            if not change.readers:
                self.after.setdefault(change.node, []).append(make)
                continue
            spots = self.before.setdefault(change.readers[0], {})
            key = len(change.readers), change.node, self.result(cut)
            chain = spots.setdefault(key, [])
            chain.insert(len(chain) if name in cut.rule.kind.weights else 0, make)

    def readers(self, cut: Cut, name: str) -> tuple[fx.Node, ...]:
        """The nodes through which a value enters its site's computation, in order; () for all.

        All are meant of the site's result, of what it computes, and of a parameter by itself. Not
        those through which it is in the values beside it. PSG305 if the site does not read it.
        """
        kind, nodes = cut.rule.kind, cut.site.nodes
        if kind.result is None or name in (kind.result, kind.computes):
            return ()
        same = {node for node in self.order if self.merged(node) is self.merged(nodes[name])}
        beside = [nodes[word] for word in kind.beside(name) if word in nodes]
        region = find_region([*same, *beside], nodes[str(kind.computes)])
        found = tuple(n for n in region.nodes if not same.isdisjoint(n.all_input_nodes))
        if not found:
            raise SurgeryError(
                "PSG305",
                f"{cut.operation.name} rewrites '{name}', which what {cut.placed.module} computes "
                "is not made of",
                "rewrite the result instead",
            )
        return found

    def result(self, cut: Cut) -> fx.Node | None:
        """The node that computes the site's result; None for a parameter's site."""
        result = cut.rule.kind.result
        return None if result is None else self.merged(cut.site.nodes[result])

    def run(self) -> fx.Graph:
        """Copy the graph, make what is planned, and leave out what nothing reads."""
        self.begin()
        for node in self.program.graph.nodes:
            self.visit(self.merged(node))
        for new in reversed(self.graph.nodes):
            if ("surgery" in new.meta or new.name in self.rerun) and not new.users:
                self.graph.erase_node(new)
        return self.graph

    def begin(self) -> None:
        """Copy the inputs, which come before all else."""
        for node in self.program.graph.find_nodes(op="placeholder"):
            self.values.everywhere[node] = self.copied(node)

    def visit(self, node: fx.Node) -> None:
        """Copy a node, with what is made before and after it, unless that is done."""
        if node.op != "placeholder":
            if node in self.values.everywhere:
                return
            spots = self.before.get(node, {})
            for spot in sorted(spots, key=lambda spot: -spot[0]):  # what most nodes read first
                for make in spots[spot]:
                    make()
            self.values.everywhere[node] = self.copied(node)
        for make in self.after.get(node, ()):
            make()

    def copied(self, node: fx.Node) -> fx.Node:
        """A copy of a node, which reads what stands for its sources."""
        return self.copy(node, self.values)

    def copy(self, node: fx.Node, values: Values) -> fx.Node:
        """A copy of a node that reads these values."""
        call = self.calls.get(node, (node.args, node.kwargs))
        args, kwargs = map_arg(call, lambda source: values.read(self.merged(source), node))
        new = self.graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)
        new.meta = dict(node.meta)
        return new

    def values_of(self, cut: Cut) -> Values:
        """The values that a cut is made of."""
        return self.values

    def make(self, change: Replacement, is_last: bool) -> None:
        """Append the expression of one new value, and put it in the old one's place."""
        cut, values = change.cut, self.values_of(change.cut)
        old = values.read(change.node, change.origin)
        rule = cut.rule.model_copy(update={"rewrite": {change.name: cut.rule.rewrite[change.name]}})
        domain = ProxyDomain(self, cut, {change.node: old}, change.origin)
        names = environment(cut, domain)
        value = rewrite(rule, names, domain.context(cut))[change.name]
        new = finished(change, value, domain)
        self.put(change, old, new)
        if is_last:
            self.keep_folded(cut, names, domain)
        if change.readers and change.name in cut.rule.kind.weights:
            values.kept[change.node, self.result(cut)] = new
        self.keep_operands(cut, domain.own, value)
        if cut.rule.kind.lengthens and change.readers and cut.site.facts.get("kind") == "key":
            sites = analyse(cut.placed.program).sites
            cores = [site for site in sites if site.kind == "attention"]
            y = cut.site.nodes[str(cut.rule.kind.result)]
            self.calls |= calls_for_more(change.node, y, cores)

    def put(self, change: Replacement, old: fx.Node, new: fx.Node) -> None:
        """Put a new value in the old one's place."""
        self.values.put(change.node, change.readers, new)
        if not change.readers and new is not old:
            take_place(old, new)

    def keep_folded(self, cut: Cut, names: Mapping[str, Any], domain: ProxyDomain) -> None:
        """Fold a cut into each weight of its site, for later cuts there that read it.

        A weight that the cut rewrites is what it was rewritten to.
        """
        for name, value in fold(cut.rule, names).items():
            node = None if name in cut.rule.rewrite else cut.site.nodes.get(name)
            is_weight = node is not None and (node.op == "get_attr" or name in cut.made)
            if node is None or not is_weight or not isinstance(value, fx.Proxy):
                continue
            value = cast(value, compute_dtype(cut), dtype_of(node))
            whole = disorient(domain.bound(cut, name), cut.site, name, value)
            domain.values.kept[self.merged(node), self.result(cut)] = whole.node

    def keep_operands(self, cut: Cut, replay: Replay, value: Any) -> None:
        """Keep a core's operands for later cuts there, if the new value is the core run again."""
        if replay.result is None:
            return
        self.rerun.update(node.name for node in replay.region.nodes)
        given = replay.given if value is replay.result else {}
        for node, operand in given.items():
            if operand is not None:
                is_own = node.graph is self.program.graph  # else a mask's, where there was none
                self.values_of(cut).kept[node if is_own else None, self.result(cut)] = operand.node


class Inserted(GraphAppendingTracer):
    """Makes nodes that serve another: they have its origin, and say whose they are."""

    def __init__(self, graph: fx.Graph, adapter: str, origin: fx.Node) -> None:
        super().__init__(graph)
        self.adapter, self.origin = adapter, origin

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
    ) -> fx.Node:
        """Make a node; one that computes is named after the adapter, too."""
        if name is None and kind == "call_function":
            name = f"{self.adapter}_{getattr(target, '__name__', '').partition('.')[0]}"
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        inherit(node, self.origin)
        node.meta["surgery"] = self.adapter
        return node


class ProxyDomain(ValueDomain):
    """Domain of fx proxies of what stands for a program's nodes now; reading appends nodes.

    ``old`` are the nodes whose values are replaced, as they are so far; what is appended serves
    ``origin``.
    """

    def __init__(
        self, walk: Walk, cut: Cut, old: Mapping[fx.Node, fx.Node], origin: fx.Node
    ) -> None:
        self.walk, self.cut, self.values = walk, cut, walk.values_of(cut)
        self.known = dict(old)
        self.tracer = Inserted(walk.graph, cut.operation.name, origin)
        mask = self.values.kept.get((None, walk.result(cut)))
        given = None if mask is None else fx.Proxy(mask, self.tracer)
        self.own = Replay(cut.placed, self.proxy, compute_dtype(cut), given)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Proxy of what stands for a node; computed ahead if the node comes later."""
        source = self.walk.merged(node)
        if source.op == "get_attr":
            self.walk.visit(source)
        spot = source, self.walk.result(self.cut)
        known = self.known.get(source) or self.values.kept.get(spot)
        known = known or self.values.everywhere.get(source)
        if known is None:
            args, kwargs = map_arg((source.args, source.kwargs), lambda n: self.proxy(n).node)
            known = self.tracer.create_node(source.op, source.target, args, kwargs)
            known.meta["val"] = source.meta.get("val")
            self.known[source] = known
        return fx.Proxy(known, self.tracer)

    def attribute(self, name: str) -> fx.Proxy:
        """A tensor or a flag of the model, read here."""
        return fx.Proxy(self.tracer.create_node("get_attr", name, (), {}), self.tracer)

    def bound(self, cut: Cut, name: str) -> fx.Proxy:
        """A value, or a weight with earlier cuts folded in."""
        return self.proxy(cut.site.nodes[name])

    def parameter(self, cut: Cut, name: str) -> fx.Proxy:
        """A parameter, in the dtype that the cut computes in.

        Beside values in another dtype it may have been cast with the whole model since.
        """
        value = self.attribute(join(cut.holder, name))
        own: torch.dtype = getattr(torch, cut.rule.params[name].dtype)
        dtypes = {dtype_of(node) for node in cut.site.nodes.values() if is_float(node)}
        return value if dtypes <= {own} else value.to(compute_dtype(cut))

    def replay(self, cut: Cut) -> Replay:
        """The site's functions over proxies: for a cut that this one is over, in its own dtype."""
        return self.own if cut is self.cut else self.own.computing_in(compute_dtype(cut))

    def context(self, cut: Cut) -> Context:
        """Context of a cut: the train flag of its module, and its site's functions."""
        owner = cut.holder if cut.rule.params else cut.site.module
        return replace(super().context(cut), training=self.attribute(join(owner, "training")))


def finished(change: Replacement, value: Any, domain: ProxyDomain) -> fx.Node:
    """The rewritten value in the dtype and layout of the one it replaces."""
    cut, name = change.cut, change.name
    if not isinstance(value, fx.Proxy):
        raise SurgeryError("PSG305", f"{cut.operation.name}: '{name}' is rewritten to {value!r}")
    value = cast(value, compute_dtype(cut), dtype_of(change.node))
    if name in cut.rule.kind.weights:
        value = disorient(domain.proxy(change.node), cut.site, name, value)
    else:
        value = as_held(cut.site, name, value)
    if cut.site.taken is not None and name == cut.rule.kind.result:
        value = cut.site.taken.put(domain.proxy(change.node), features_dim(cut.site), value)
    value.node.meta["val"] = change.node.meta.get("val")
    new: fx.Node = value.node
    return new
