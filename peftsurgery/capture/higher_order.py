"""Regions that torch.export keeps as graphs of their own: inlined, so that one graph holds it all.

What ran under no_grad (rotary tables) is detached; what ran under autocast stands between a call
that enters it and a call that leaves it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from peftsurgery.capture.schemas import writes
from peftsurgery.capture.stack import inherit
from peftsurgery.errors import SurgeryError

GRADIENT = torch.ops.higher_order.wrap_with_set_grad_enabled
CAST = torch.ops.higher_order.wrap_with_autocast
# Where torch has what it puts into a graph for torch.vmap.
TRANSFORMS = "torch._functorch.predispatch"
AUTOCAST: tuple[Callable[..., Any], ...] = (_enter_autocast, _exit_autocast)


def inline_regions(module: fx.GraphModule) -> None:
    """Inline every region, inner ones first.

    PSG201 for an operator whose graphs are choices, and for a transform (torch.vmap).
    """
    for node in module.graph.nodes:
        if getattr(node.target, "__module__", None) == TRANSFORMS:
            message = "a graph with torch.vmap in it cannot be operated on"
            raise SurgeryError("PSG201", message, "write the batch as an axis of the tensors")
    for node in list(module.graph.find_nodes(op="get_attr")):
        inner = getattr(module, str(node.target), None) if "." not in str(node.target) else None
        if not isinstance(inner, fx.GraphModule):
            continue
        inline_regions(inner)
        for call in list(node.users):
            if call.target is GRADIENT:
                _inline_gradient(module.graph, call, inner.graph)
            elif call.target is CAST:
                _inline_autocast(module.graph, call, inner.graph)
            else:
                message = f"a graph with '{call.target}' in it cannot be operated on"
                raise SurgeryError("PSG201", message)
        module.graph.erase_node(node)


def _inline_gradient(graph: fx.Graph, call: fx.Node, inner: fx.Graph) -> None:
    enabled, _, *inputs = call.args
    # A region that writes in place must not see values with gradients; others are detached behind.
    is_writing = any(writes(node.target) for node in inner.nodes)
    with graph.inserting_before(call):
        if not enabled and is_writing:
            inputs = [_detached(graph, cast("fx.Node", value), call) for value in inputs]
        results = _copy(graph, inner, inputs)
        if not enabled and not is_writing:
            results = [_detached(graph, result, call) for result in results]
    _replace(graph, call, results)


def _inline_autocast(graph: fx.Graph, call: fx.Node, inner: fx.Graph) -> None:
    device, dtype, enabled, cache, _, *inputs = call.args
    with graph.inserting_before(call):
        entered = graph.call_function(_enter_autocast, (device, dtype, enabled, cache))
        results = _copy(graph, inner, inputs)
        left = graph.call_function(_exit_autocast, (entered,))
    inherit(entered, call)
    inherit(left, call)
    _replace(graph, call, results)


def _copy(graph: fx.Graph, inner: fx.Graph, inputs: Sequence[Any]) -> list[fx.Node]:
    """Copy a region's nodes to where nodes are inserted now; its outputs."""
    value_of = dict(zip(inner.find_nodes(op="placeholder"), inputs, strict=True))
    return [*cast("list[fx.Node]", graph.graph_copy(inner, value_of))]


def _replace(graph: fx.Graph, call: fx.Node, results: Sequence[fx.Node]) -> None:
    for pick in list(call.users):
        pick.replace_all_uses_with(results[cast("int", pick.args[1])])
        graph.erase_node(pick)
    graph.erase_node(call)


def _detached(graph: fx.Graph, node: fx.Node, call: fx.Node) -> fx.Node:
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return node
    detached = graph.call_function(torch.ops.aten.detach.default, (node,))
    inherit(detached, call)
    detached.meta["val"] = node.meta["val"]
    return detached
