"""Rewriting one program: a copy of its graph with every cut's expression sewn in.

A rule's text is read over fx proxies, so evaluating it inserts nodes. They are inserted right after
the value they replace, keep that node's origin, and carry ``meta["surgery"]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer

from ..anatomy import Site, analyse
from ..anatomy.site import join
from ..capture import Program
from ..capture.stack import inherit
from ..errors import SurgeryError
from ..language import Context, fold, rewrite, shape_of
from ..language.consistency import OUTPUTS
from .layout import as_held, as_seen
from .operation import Cut
from .region import calls_for_more
from .replay import Replay


class Rewriter:
    """Sews cuts into a copy of a program's graph, in order; ``graph`` is the result."""

    def __init__(self, program: Program) -> None:
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        result = self.graph.graph_copy(program.graph, self.copies)
        for node, copy in self.copies.items():
            copy.meta = dict(node.meta)
        self.graph.output(result)
        self.tracer = GraphAppendingTracer(self.graph)
        self.latest: MutableMapping[fx.Node, fx.Node] = {}
        # The folded weight so far, by the weight's node and the site's result: a later cut at the
        # same place sees what earlier ones made of it.
        self.weights: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        self.masks: dict[fx.Node, fx.Proxy] = {}
        self.retired: set[fx.Node] = set()

    def sew(self, cut: Cut) -> None:
        """Insert one cut: what it does to the site's inputs first, then to its result."""
        result = cut.rule.kind.result
        names = sorted(cut.rule.rewrite, key=lambda name: name == result)
        for name in names:
            self.sew_value(cut, name, is_last=name == names[-1])

    def sew_value(self, cut: Cut, name: str, is_last: bool) -> None:
        """Insert the expression for one of the cut's new values, and let it be used."""
        old = self.node(cut.site.nodes[name])
        is_result = name == cut.rule.kind.result
        users = [] if is_result else self.between(old, self.result(cut))
        rule = cut.rule.model_copy(update={"rewrite": {name: cut.rule.rewrite[name]}})
        before, place = set(self.graph.nodes), old.next if is_result else users[0]
        # fx inserts "after" in reverse order, so new nodes go before what comes next
        with self.graph.inserting_before(place):
            replay = self.replay(cut, place)
            bindings = self.bindings(cut, replay)
            # first, since a later cut is inserted right after the new value
            folded = self.folded(cut, bindings) if is_last else {}
            value = rewrite(rule, bindings, self.context(cut, replay))[name]
            new = self.finish(cut, name, value)
        inserted = {node for node in self.graph.nodes if node not in before}
        for node in inserted:
            inherit(node, old)
            node.meta["surgery"] = cut.operation.name
        if is_result:
            users = [user for user in old.users if user not in inserted]
        self.use(cut, name, old, new, users)
        self.weights.update(folded)
        self.retire(cut, replay, value)
        if cut.rule.kind.lengthens and not is_result:
            self.lengthen(cut, name)

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
        self, cut: Cut, name: str, old: fx.Node, new: fx.Node, users: Sequence[fx.Node]
    ) -> None:
        """Let the users of a value, and later cuts if it is the site's result, see the new one."""
        for user in users:
            user.replace_input_with(old, new)
        if name == cut.rule.kind.result:
            self.latest[self.copies[cut.site.nodes[name]]] = new

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

    def result(self, cut: Cut) -> fx.Node:
        """The node of the graph that computes the site's result."""
        return self.copies[cut.site.nodes[str(cut.rule.kind.result)]]

    def between(self, start: fx.Node, end: fx.Node) -> list[fx.Node]:
        """The users of ``start`` through which it reaches ``end``, in the graph's order."""
        reaches, stack = {end}, [end]
        while stack:
            for source in stack.pop().all_input_nodes:
                if source is not start and source not in reaches:
                    reaches.add(source)
                    stack.append(source)
        return [node for node in self.graph.nodes if node in start.users and node in reaches]

    def node(self, original: fx.Node) -> fx.Node:
        """What stands for a node of the program now."""
        copy = self.copies[original]
        return self.latest.get(copy, copy)

    def bindings(self, cut: Cut, replay: Replay) -> dict[str, Any]:
        """The rule's names: values, weights and parameters as proxies, sizes and settings plain."""
        site, kind = cut.site, cut.rule.kind
        dtype = compute_dtype(cut)
        bound: dict[str, Any] = dict(cut.numbers)
        for name in kind.values:
            if name in site.nodes:
                value = fx.Proxy(self.node(site.nodes[name]), self.tracer)
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
        dtypes = {dtype_of(node) for node in cut.site.nodes.values() if _is_float(node)}
        for name, param in cut.rule.params.items():
            node = self.graph.create_node("get_attr", join(cut.place, name))
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
        owner = cut.place if cut.rule.params else cut.site.module
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
        known = self.weights.get((self.copies[original], self.result(cut)))
        if known is None:
            known = self.graph.create_node("get_attr", str(original.target))
            known.meta["val"] = original.meta["val"]
        return fx.Proxy(known, self.tracer)

    def folded(
        self, cut: Cut, bindings: Mapping[str, Any]
    ) -> dict[tuple[fx.Node, fx.Node], fx.Node]:
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
    dtypes += [dtype_of(node) for node in cut.site.nodes.values() if _is_float(node)]
    dtype: torch.dtype = dtypes[0] if dtypes else torch.float32
    for other in dtypes:
        dtype = torch.promote_types(dtype, other)
    return dtype


def orient(value: Any, site: Site, name: str) -> Any:
    """A stored weight as rules see it: (out, in), and the slice alone."""
    value = as_seen(site, name, value)
    return value if site.slice is None else site.slice.take(value, 0)


def disorient(whole: Any, site: Site, name: str, value: Any) -> Any:
    """``value`` put back where :func:`orient` took it from in the stored weight ``whole``."""
    if site.slice is not None:
        value = site.slice.put(as_seen(site, name, whole), 0, value)
    return as_held(site, name, value)


def cast(value: Any, source: torch.dtype | None, target: torch.dtype | None) -> Any:
    """A value in another dtype, if both are known and hold floating-point numbers."""
    if source is None or target is None or source == target:
        return value
    if not source.is_floating_point or not target.is_floating_point:
        return value
    return value.to(target)


def wide(value: torch.Tensor) -> torch.Tensor:
    """A weight in the dtype that weights are added in: at least fp32."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of the tensor that a node stands for."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def _is_float(node: fx.Node) -> bool:
    dtype = dtype_of(node)
    return dtype is not None and dtype.is_floating_point


def check_shapes(cut: Cut) -> None:
    """Evaluate a cut over fake tensors: PSG306 if the new value has another shape.

    PSG305 if the site has nothing of the name that is rewritten (a mask, a bias).
    """
    for name in cut.rule.rewrite:
        if name not in cut.site.nodes:
            raise SurgeryError(
                "PSG305",
                f"{cut.operation.name} rewrites '{name}', and {cut.placed.module} has none",
                "leave such sites out with `where:`",
            )
    for name, value in fake_rewrite(cut).items():
        if cut.rule.kind.lengthens:
            continue
        expected = as_seen(cut.site, name, _fake(cut, name))
        if tuple(value.shape) != tuple(expected.shape):
            raise SurgeryError(
                "PSG306",
                f"{cut.operation.name} at {cut.placed.module}: the new {name} has shape "
                f"{list(value.shape)}, where {list(expected.shape)} is needed",
            )


def fake_rewrite(cut: Cut, result: Any = None) -> dict[str, Any]:
    """The values a cut computes, as fake tensors; ``result`` is what its site gave so far."""
    fakes = [node.meta["val"] for node in cut.site.nodes.values()]
    mode = next((f.fake_mode for f in fakes if hasattr(f, "fake_mode")), None)
    if mode is None:
        return {}
    dtype = compute_dtype(cut)
    with mode, enable_python_dispatcher():  # which operators of symbolic sizes go through
        bound: dict[str, Any] = {**dict.fromkeys(cut.rule.kind.weights, 0.0), **cut.numbers}
        replay = Replay(cut.placed, _value, dtype)
        bound |= {name: replay.mask() for name in cut.rule.kind.optional}
        for name in sorted(cut.site.nodes.keys() & cut.rule.kind.names):
            node = cut.site.nodes[name]
            value = node.meta["val"]
            if name in cut.rule.kind.weights:
                value = orient(value, cut.site, name)
            elif name != cut.rule.kind.result:
                value = as_seen(cut.site, name, value)
            else:
                value = as_seen(cut.site, name, _fake(cut, name) if result is None else result)
            bound[name] = value.to(dtype) if _is_float(node) else value
        for name, param in cut.rule.params.items():
            shape = shape_of(param, cut.rule, cut.numbers)
            bound[name] = torch.empty(shape, dtype=dtype, device=_device(fakes))
        if cut.over:
            bound[OUTPUTS] = torch.stack([fake_output(c).to(dtype) for c in cut.over], -2)
        context = Context(functions=replay.functions)
        return {
            name: value
            for name, value in rewrite(cut.rule, bound, context).items()
            if isinstance(value, torch.Tensor)
        }


def fake_output(cuts: Sequence[Cut]) -> Any:
    """What the cuts of one adapter make of their site's result, as a fake tensor."""
    value = None
    for cut in cuts:
        value = fake_rewrite(cut, value)[str(cut.rule.kind.result)]
    return value


def _fake(cut: Cut, name: str) -> Any:
    value = cut.site.nodes[name].meta["val"]
    if cut.site.slice is not None and name == cut.rule.kind.result:
        return cut.site.slice.take(value, -1)
    return value


def _value(node: fx.Node) -> Any:
    """The fake value of a node; a flag of the mode, or a rate that depends on it, is off."""
    value = node.meta.get("val")
    return 0 if value is None else value


def _device(fakes: Iterable[Any]) -> torch.device:
    return next(f.device for f in fakes if isinstance(f, torch.Tensor))
