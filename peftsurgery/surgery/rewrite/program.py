"""Rewriting of one program: a copy of its graph with every cut's expression inserted.

A rule's text is read over fx proxies, so evaluating it inserts nodes. They are inserted right after
the value they replace, keep that node's origin, and carry ``meta["surgery"]``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer

from peftsurgery.anatomy import analyse
from peftsurgery.capture import Program
from peftsurgery.capture.module_calls import take_place
from peftsurgery.capture.names import join
from peftsurgery.capture.stack import inherit
from peftsurgery.errors import SurgeryError
from peftsurgery.language.evaluation import Context
from peftsurgery.language.readings import fold, names_in, rewrite
from peftsurgery.reach import reach
from peftsurgery.surgery.plan.cut import Cut
from peftsurgery.surgery.rewrite.dtypes import cast, compute_dtype, dtype_of, is_float
from peftsurgery.surgery.rewrite.environment import Domain, environment
from peftsurgery.surgery.rewrite.layout import as_held, disorient
from peftsurgery.surgery.rewrite.rerun import calls_for_more
from peftsurgery.surgery.rewrite.site_functions import Replay


class Rewriter:
    """Inserts cuts into a copy of a program's graph, in order; ``graph`` is the result."""

    def __init__(self, program: Program) -> None:
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        result = self.graph.graph_copy(program.graph, self.copies)
        for node, copy in self.copies.items():
            copy.meta = dict(node.meta)
        self.graph.output(result)
        self.merge_reads()
        self.tracer = GraphAppendingTracer(self.graph)
        self.latest: MutableMapping[fx.Node, fx.Node] = {}
        # The folded weight so far, by the weight's node and the site's result: a later cut at the
        # same site sees what earlier ones made of it.
        self.weights: dict[tuple[fx.Node, fx.Node | None], fx.Node] = {}
        # The weight that a site reads now, likewise.
        self.taken: dict[tuple[fx.Node, fx.Node | None], fx.Node] = {}
        self.masks: dict[fx.Node | None, fx.Proxy] = {}
        self.retired: set[fx.Node] = set()

    def merge_reads(self) -> None:
        """Merge repeated reads of a tensor into one node, so that one node can replace it."""
        first: dict[Any, fx.Node] = {}
        for original, copy in self.copies.items():
            one = first.setdefault(copy.target, copy) if copy.op == "get_attr" else copy
            if one is not copy:
                copy.replace_all_uses_with(one)
                self.graph.erase_node(copy)
                self.copies[original] = one

    def sew(self, cut: Cut) -> None:
        """Insert one cut: earlier values of the site before those computed from them."""
        order = {node: number for number, node in enumerate(self.graph.nodes)}
        names = sorted(cut.rule.rewrite, key=lambda name: order[self.copies[cut.site.nodes[name]]])
        for name in names:
            self.sew_value(cut, name, is_last=name == names[-1])

    def sew_value(self, cut: Cut, name: str, is_last: bool) -> None:
        """Insert the expression of one new value, and redirect its readers."""
        spot = self.copies[cut.site.nodes[name]], self.result(cut)
        old = self.taken.get(spot) or self.node(cut.site.nodes[name])
        readers = self.readers(cut, name, old)
        rule = cut.rule.model_copy(update={"rewrite": {name: cut.rule.rewrite[name]}})
        before, point = set(self.graph.nodes), old.next if readers is None else readers[0]
        # fx inserts "after" in reverse order, so new nodes go before what comes next
        with self.graph.inserting_before(point):
            replay = self.replay(cut, point)
            read = names_in([rule.rewrite[name], *rule.fold.values()], rule, cut.numbers)
            proxies = ProxyDomain(self, cut, replay, read)
            names = environment(cut, proxies)
            # first, since a later cut is inserted right after the new value
            folded = self.folded(cut, names) if is_last else {}
            value = rewrite(rule, names, proxies.context(cut))[name]
            new = self.finish(cut, name, value)
        inserted = {node for node in self.graph.nodes if node not in before}
        for node in inserted:
            # what is made of an input is made where it is read, as if its reader did it
            inherit(node, old if readers is None else point)
            node.meta["surgery"] = cut.operation.name
        is_everywhere = readers is None
        if readers is None:
            readers = [user for user in old.users if user not in inserted]
        self.use(cut, name, old, new, readers, is_everywhere)
        self.weights.update(folded)
        if name in cut.rule.kind.weights and not is_everywhere:
            self.weights[spot] = self.taken[spot] = new
        self.retire(cut, replay, value)
        if cut.rule.kind.lengthens and name != cut.rule.kind.result:
            self.lengthen(cut, name)

    def readers(self, cut: Cut, name: str, old: fx.Node) -> list[fx.Node] | None:
        """Users through which a value enters its site's computation; None for all of them.

        All are meant of the site's result, of what it computes, and of a parameter by itself.
        PSG305 if the site does not read the value.
        """
        kind, nodes = cut.rule.kind, cut.site.nodes
        if kind.result is None or name in (kind.result, kind.computes):
            return None
        beside = [self.node(nodes[word]) for word in kind.beside(name) if word in nodes]
        found = self.between(old, self.copies[nodes[str(kind.computes)]], beside)
        if not found:
            raise SurgeryError(
                "PSG305",
                f"{cut.operation.name} rewrites '{name}', which what {cut.placed.module} computes "
                "is not made of",
                "rewrite the result instead",
            )
        return found

    def lengthen(self, cut: Cut, name: str) -> None:
        """Refit views and expands between longer position ids and the attention cores."""
        if cut.site.facts.get("kind") != "key":
            return
        sites = analyse(cut.placed.program).sites
        cores = [site for site in sites if site.kind == "attention"]
        y = cut.site.nodes[str(cut.rule.kind.result)]
        for node, call in calls_for_more(cut.site.nodes[name], y, cores).items():
            self.copies[node].args, self.copies[node].kwargs = map_arg(call, self.node)

    def use(
        self,
        cut: Cut,
        name: str,
        old: fx.Node,
        new: fx.Node,
        users: Sequence[fx.Node],
        is_everywhere: bool,
    ) -> None:
        """Redirect users to a new value, and later cuts too if all users are meant."""
        for user in users:
            user.replace_input_with(old, new)
        if is_everywhere:
            self.latest[self.copies[cut.site.nodes[name]]] = new
            take_place(old, new)

    def replay(self, cut: Cut, point: fx.Node) -> Replay:
        """The site's functions over proxies, for nodes that are inserted before ``point``."""
        late = set[fx.Node]()
        node = point
        while node.op != "root":
            late.add(node)
            node = node.next

        def early(node: fx.Node) -> fx.Node:
            """Replacement of a node, recomputed if it stands too late in the graph."""
            return self.graph.node_copy(node, early) if node in late else node

        def outside(original: fx.Node) -> fx.Proxy:
            return fx.Proxy(early(self.node(original)), self.tracer)

        mask = self.masks.get(self.result(cut)) if cut.rule.kind.functions else None
        return Replay(cut.placed, outside, compute_dtype(cut), mask)

    def retire(self, cut: Cut, replay: Replay, value: Any) -> None:
        """Rebind a core's operands for later cuts, where the new value is the core run again."""
        if replay.result is None:
            return
        self.retired.update(self.copies[node] for node in replay.region.nodes)
        if value is not replay.result:
            return
        for node, given in replay.given.items():
            if node in self.copies:
                self.latest[self.copies[node]] = given.node
            else:
                self.masks[self.result(cut)] = given

    def result(self, cut: Cut) -> fx.Node | None:
        """The node of the graph that computes the site's result; None for a parameter's site."""
        result = cut.rule.kind.result
        return None if result is None else self.copies[cut.site.nodes[result]]

    def between(
        self, start: fx.Node, end: fx.Node, beside: Collection[fx.Node] = ()
    ) -> list[fx.Node]:
        """Users of ``start`` on paths to ``end``, in the graph's order.

        Not those through which it is in the values ``beside`` it.
        """
        others = {start, *beside}
        reaches = set(
            reach([end], lambda node: (n for n in node.all_input_nodes if n not in others))
        )
        return [node for node in self.graph.nodes if node in start.users and node in reaches]

    def attribute(self, name: str) -> fx.Proxy:
        """A tensor or a flag of the model, read here."""
        return fx.Proxy(self.graph.create_node("get_attr", name), self.tracer)

    def proxy(self, original: fx.Node) -> fx.Proxy:
        """Proxy of a node's current replacement."""
        return fx.Proxy(self.node(original), self.tracer)

    def node(self, original: fx.Node) -> fx.Node:
        """Current replacement of a node of the program."""
        copy = self.copies[original]
        return self.latest.get(copy, copy)

    def stored(self, cut: Cut, name: str) -> fx.Proxy:
        """Stored weight, with earlier cuts folded in."""
        original = cut.site.nodes[name]
        copy = self.copies[original]
        known = self.weights.get((copy, self.result(cut)), self.latest.get(copy))
        if known is None:
            known = self.graph.create_node("get_attr", str(original.target))
            known.meta["val"] = original.meta["val"]
        return fx.Proxy(known, self.tracer)

    def folded(
        self, cut: Cut, bindings: Mapping[str, Any]
    ) -> dict[tuple[fx.Node, fx.Node | None], fx.Node]:
        """Fold this cut into each weight of the site, for later cuts that read it."""
        results = {}
        for name, value in fold(cut.rule, bindings).items():
            original = cut.site.nodes.get(name)
            if original is None or original.op != "get_attr" or not isinstance(value, fx.Proxy):
                continue
            value = cast(value, compute_dtype(cut), dtype_of(original))
            whole = disorient(self.stored(cut, name), cut.site, name, value)
            results[self.copies[original], self.result(cut)] = whole.node
        return results

    def finish(self, cut: Cut, name: str, value: Any) -> fx.Node:
        """The rewritten value in the dtype and layout of the one it replaces."""
        if not isinstance(value, fx.Proxy):
            raise SurgeryError(
                "PSG305", f"{cut.operation.name}: '{name}' is rewritten to {value!r}"
            )
        original = cut.site.nodes[name]
        value = cast(value, compute_dtype(cut), dtype_of(original))
        if name in cut.rule.kind.weights:
            value = disorient(self.stored(cut, name), cut.site, name, value)
        else:
            value = as_held(cut.site, name, value)
        if cut.site.slice is not None and name == cut.rule.kind.result:
            whole = fx.Proxy(self.node(original), self.tracer)
            value = cut.site.slice.put(whole, -1, value)
        value.node.meta["val"] = original.meta.get("val")
        return value.node

    def drop_unused(self) -> None:
        """Remove inserted nodes without users, and cores that were run again."""
        for node in reversed(self.graph.nodes):
            if ("surgery" in node.meta or node in self.retired) and not node.users:
                self.graph.erase_node(node)


class ProxyDomain(Domain):
    """Domain of fx proxies of a program's current nodes; reading inserts nodes.

    The names ``read`` are there where the replay's nodes are inserted.
    """

    is_eager = True  # nodes are in one order, whatever is read first

    def __init__(
        self,
        rewriter: Rewriter,
        cut: Cut,
        replay: Replay | None = None,
        read: Collection[str] = (),
    ) -> None:
        self.rewriter, self.cut, self.read, self.own = rewriter, cut, read, replay

    def weight(self, cut: Cut, name: str) -> fx.Proxy:
        """A weight, with earlier cuts folded in."""
        return self.rewriter.stored(cut, name)

    def value(self, cut: Cut, name: str) -> fx.Proxy:
        """A value, recomputed where its node stands too late in the graph."""
        node = cut.site.nodes[name]
        replay = self.own if cut is self.cut and name in self.read else None
        found: fx.Proxy = self.rewriter.proxy(node) if replay is None else replay.outside(node)
        return found

    def parameter(self, cut: Cut, name: str) -> fx.Proxy:
        """A parameter, in the dtype that the cut computes in.

        Beside values in another dtype it may have been cast with the whole model since.
        """
        value = self.rewriter.attribute(join(cut.holder, name))
        own: torch.dtype = getattr(torch, cut.rule.params[name].dtype)
        dtypes = {dtype_of(node) for node in cut.site.nodes.values() if is_float(node)}
        return value if dtypes <= {own} else value.to(compute_dtype(cut))

    def replay(self, cut: Cut) -> Replay | None:
        """The site's functions over proxies: for a cut that this one is over, in its own dtype."""
        if self.own is None or cut is self.cut:
            return self.own
        return self.own.computing_in(compute_dtype(cut))

    def context(self, cut: Cut) -> Context:
        """Context of a cut: the train flag of its module, and its site's functions."""
        owner = cut.holder if cut.rule.params else cut.site.module
        return replace(
            super().context(cut), training=self.rewriter.attribute(join(owner, "training"))
        )
