"""Rewriting one program: a copy of its graph with every cut's expression sewn in.

A rule's text is read over fx proxies, so evaluating it inserts nodes. They are inserted right after
the value they replace, keep that node's origin, and carry ``meta["surgery"]``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
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
from peftsurgery.language import Context, fold, names_in, rewrite
from peftsurgery.language.consistency import OUTPUTS
from peftsurgery.reach import reach
from peftsurgery.surgery.plan.cut import Cut
from peftsurgery.surgery.rewrite.layout import as_held, as_seen, disorient, orient
from peftsurgery.surgery.rewrite.rerun import calls_for_more
from peftsurgery.surgery.rewrite.site_functions import Replay


class Rewriter:
    """Sews cuts into a copy of a program's graph, in order; ``graph`` is the result."""

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
        # same place sees what earlier ones made of it.
        self.weights: dict[tuple[fx.Node, fx.Node | None], fx.Node] = {}
        # The weight that a site reads now, likewise.
        self.taken: dict[tuple[fx.Node, fx.Node | None], fx.Node] = {}
        self.masks: dict[fx.Node | None, fx.Proxy] = {}
        self.retired: set[fx.Node] = set()

    def merge_reads(self) -> None:
        """Let a tensor be read by one node, so that what replaces it is one node too."""
        first: dict[Any, fx.Node] = {}
        for original, copy in self.copies.items():
            one = first.setdefault(copy.target, copy) if copy.op == "get_attr" else copy
            if one is not copy:
                copy.replace_all_uses_with(one)
                self.graph.erase_node(copy)
                self.copies[original] = one

    def sew(self, cut: Cut) -> None:
        """Insert one cut: what it does to a value before what it does to those made of it."""
        order = {node: place for place, node in enumerate(self.graph.nodes)}
        names = sorted(cut.rule.rewrite, key=lambda name: order[self.copies[cut.site.nodes[name]]])
        for name in names:
            self.sew_value(cut, name, is_last=name == names[-1])

    def sew_value(self, cut: Cut, name: str, is_last: bool) -> None:
        """Insert the expression for one of the cut's new values, and let it be used."""
        spot = self.copies[cut.site.nodes[name]], self.result(cut)
        old = self.taken.get(spot) or self.node(cut.site.nodes[name])
        readers = self.readers(cut, name, old)
        rule = cut.rule.model_copy(update={"rewrite": {name: cut.rule.rewrite[name]}})
        before, place = set(self.graph.nodes), old.next if readers is None else readers[0]
        # fx inserts "after" in reverse order, so new nodes go before what comes next
        with self.graph.inserting_before(place):
            replay = self.replay(cut, place)
            read = names_in([rule.rewrite[name], *rule.fold.values()], rule, cut.numbers)
            bindings = self.bindings(cut, replay, read)
            # first, since a later cut is inserted right after the new value
            folded = self.folded(cut, bindings) if is_last else {}
            value = rewrite(rule, bindings, self.context(cut, replay))[name]
            new = self.finish(cut, name, value)
        inserted = {node for node in self.graph.nodes if node not in before}
        for node in inserted:
            # what is made of an input is made where it is read, as if its reader did it
            inherit(node, old if readers is None else place)
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
        """The users through which a value goes into what its site computes; None for all of them.

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
        """Let what is computed from a value on its way to the cores be longer, if it is now."""
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
        """Let the users of a value, and later cuts if those are all of them, see the new one."""
        for user in users:
            user.replace_input_with(old, new)
        if is_everywhere:
            self.latest[self.copies[cut.site.nodes[name]]] = new
            take_place(old, new)

    def replay(self, cut: Cut, place: fx.Node) -> Replay:
        """The site's functions over proxies, for nodes that are inserted before ``place``."""
        late = set[fx.Node]()
        node = place
        while node.op != "root":
            late.add(node)
            node = node.next

        def early(node: fx.Node) -> fx.Node:
            """What stands for a node, computed again if that is too late."""
            return self.graph.node_copy(node, early) if node in late else node

        def outside(original: fx.Node) -> fx.Proxy:
            return fx.Proxy(early(self.node(original)), self.tracer)

        mask = self.masks.get(self.result(cut)) if cut.rule.kind.functions else None
        return Replay(cut.placed, outside, compute_dtype(cut), mask)

    def retire(self, cut: Cut, replay: Replay, value: Any) -> None:
        """If the new value is the core run again, later cuts find there what it was given."""
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
        """The users of ``start`` through which it reaches ``end``, in the graph's order.

        Not those through which it is in the values ``beside`` it.
        """
        others = {start, *beside}
        reaches = set(
            reach([end], lambda node: (n for n in node.all_input_nodes if n not in others))
        )
        return [node for node in self.graph.nodes if node in start.users and node in reaches]

    def proxy(self, original: fx.Node) -> fx.Proxy:
        """What stands for a node of the program now, to be computed with."""
        return fx.Proxy(self.node(original), self.tracer)

    def node(self, original: fx.Node) -> fx.Node:
        """What stands for a node of the program now."""
        copy = self.copies[original]
        return self.latest.get(copy, copy)

    def bindings(self, cut: Cut, replay: Replay, read: Collection[str] = ()) -> dict[str, Any]:
        """The rule's names: values, weights and parameters as proxies, sizes and settings plain.

        Those that are ``read`` are there where the replay's nodes are inserted.
        """
        site, kind = cut.site, cut.rule.kind
        dtype = compute_dtype(cut)
        bound: dict[str, Any] = dict(cut.numbers)
        for name in kind.values:
            if name in site.nodes:
                node = site.nodes[name]
                value = replay.outside(node) if name in read else self.proxy(node)
                if site.slice is not None and name == kind.result:
                    value = site.slice.take(value, -1)
                value = as_seen(site, name, value)
                bound[name] = cast(value, dtype_of(site.nodes[name]), dtype)
            elif name in kind.optional:
                bound[name] = replay.mask()
        for name in kind.weights:
            bound[name] = self.weight(cut, name, dtype)
        bound |= self.parameters(cut)
        if cut.over:
            made: Any = [self.output(group, replay, dtype) for group in cut.over]
            bound[OUTPUTS] = torch.stack(made, -2)
        return bound

    def parameters(self, cut: Cut) -> dict[str, Any]:
        """The parameters of a cut, in the dtype that it computes in.

        Beside values in another dtype they may have been cast with the whole model since.
        """
        bound = {}
        dtypes = {dtype_of(node) for node in cut.site.nodes.values() if is_float(node)}
        for name, param in cut.rule.params.items():
            node = self.graph.create_node("get_attr", join(cut.holder, name))
            own: torch.dtype = getattr(torch, param.dtype)
            value = fx.Proxy(node, self.tracer)
            bound[name] = value if dtypes <= {own} else value.to(compute_dtype(cut))
        return bound

    def output(self, cuts: Sequence[Cut], replay: Replay, dtype: torch.dtype) -> Any:
        """What the cuts of one adapter make of their site's result, none of them being sewn in."""
        value = None
        for cut in cuts:
            result = str(cut.rule.kind.result)
            mine = replay.computing_in(compute_dtype(cut))
            bindings = self.bindings(cut, mine)
            if value is not None:
                bindings[result] = cast(value, dtype, compute_dtype(cut))
            value = rewrite(cut.rule, bindings, self.context(cut, mine))[result]
            value = cast(value, compute_dtype(cut), dtype)
        return value

    def context(self, cut: Cut, replay: Replay | None = None) -> Context:
        """What a cut's text is read with: whether its module trains, what its site can do."""
        owner = cut.holder if cut.rule.params else cut.site.module
        flag = self.graph.create_node("get_attr", join(owner, "training"))
        functions = {} if replay is None else replay.functions
        return Context(fx.Proxy(flag, self.tracer), functions=functions)

    def weight(self, cut: Cut, name: str, dtype: torch.dtype) -> Any:
        """A weight as rules see it: (out, in), the slice alone, with earlier cuts folded in."""
        original = cut.site.nodes.get(name)
        if original is None:
            return 0.0
        oriented = orient(self.stored(cut, name), cut.site, name)
        return cast(oriented, dtype_of(original), dtype)

    def stored(self, cut: Cut, name: str) -> fx.Proxy:
        """A weight as the model stores it, with earlier cuts folded in."""
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
        """Each weight of the site with this cut folded in, for a later cut that reads it."""
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
        """The rewritten value in the dtype and place of the one it replaces."""
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
        """Remove what nothing uses: bindings that were not read, cores that were run again."""
        for node in reversed(self.graph.nodes):
            if ("surgery" in node.meta or node in self.retired) and not node.users:
                self.graph.erase_node(node)


def compute_dtype(cut: Cut) -> torch.dtype:
    """The dtype a cut computes in: the widest of its parameters' and its values'.

    A model in half precision trains its adapters in full precision.
    """
    dtypes = [getattr(torch, param.dtype) for param in cut.rule.params.values()]
    dtypes += [dtype_of(node) for node in cut.site.nodes.values() if is_float(node)]
    dtype: torch.dtype = dtypes[0] if dtypes else torch.float32
    for other in dtypes:
        dtype = torch.promote_types(dtype, other)
    return dtype


def cast(value: Any, source: torch.dtype | None, target: torch.dtype | None) -> Any:
    """A value in another dtype, if both are known and hold floating-point numbers."""
    if source is None or target is None or source == target:
        return value
    if not source.is_floating_point or not target.is_floating_point:
        return value
    return value.to(target)


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of the tensor that a node stands for."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def is_float(node: fx.Node) -> bool:
    """Whether a node stands for a tensor of floating-point numbers."""
    dtype = dtype_of(node)
    return dtype is not None and dtype.is_floating_point
