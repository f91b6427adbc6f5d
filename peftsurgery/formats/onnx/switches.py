"""What an ONNX graph with slots need not compute, left out of it or of a run.

    Where(switch > 0, f(y), y)      If(switch > 0, then f(y), else y)
    Where(IsNaN(p), 0, p)           p

A switch that is off costs nothing but a copy of y. The second is of torch's translation of
attention with a mask of yes and no: it is added to the scores as the smallest finite number, so
that p, their softmax, is a number.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def skip_what_is_off(model: Any, switches: Collection[str]) -> None:
    """Let an onnx_ir.Model compute what a switch chooses only where it is on."""
    for node in [each for each in model.graph if each.op_type == "Where"]:
        above = node.inputs[0].producer()
        if above is not None and any(v is not None and v.name in switches for v in above.inputs):
            _branch(model.graph, node)


def _branch(graph: Any, where: Any) -> None:
    """Put an If in the place of a Where, with all in it that the Where alone needs."""
    import onnx_ir as ir

    condition, new, old = where.inputs
    inside = _needed_by(graph, where)
    if new.producer() not in inside:
        return
    made, kept = where.outputs[0], ir.Value(name=f"{where.outputs[0].name}_off")
    graph.remove(inside)
    copied = ir.Node("", "Identity", [old], outputs=[kept])
    branches = [
        ir.AttrGraph("then_branch", ir.Graph([], [new], nodes=inside, name=f"{made.name}_then")),
        ir.AttrGraph("else_branch", ir.Graph([], [kept], nodes=[copied], name=f"{made.name}_else")),
    ]
    chosen = ir.Value(name=made.name, type=made.type, shape=made.shape)
    chooser = ir.Node("", "If", [condition], branches, outputs=[chosen])
    graph.insert_before(where, chooser)
    _replace(graph, where, chosen)


def _needed_by(graph: Any, where: Any) -> list[Any]:
    """The nodes that nothing but a Where's second input needs, in their order."""
    needed: set[Any] = set()
    for node in reversed(list(graph)):
        uses = [use for value in node.outputs for use in value.uses()]
        fed = all(use.node in needed or (use.node is where and use.idx == 1) for use in uses)
        if uses and fed and not any(value.is_graph_output() for value in node.outputs):
            needed.add(node)
    return [node for node in graph if node in needed]


def without_checks_for_nan(model: Any) -> None:
    """Leave out of an onnx_ir.Model what replaces NaN in attention's probabilities."""
    for node in [each for each in model.graph if each.op_type == "Where"]:
        check, value = node.inputs[0].producer(), node.inputs[2]
        is_check = check is not None and check.op_type == "IsNaN" and check.inputs[0] is value
        is_check = is_check and not node.outputs[0].is_graph_output()
        if is_check and _is_softmax_under_a_mask(value.producer()):
            _replace(model.graph, node, value)
            model.graph.remove(check, safe=True)


def _is_softmax_under_a_mask(node: Any) -> bool:
    """Whether this is the softmax of scores to which a choice of two finite numbers is added."""
    if node is None or node.op_type != "Softmax":
        return False
    scores = node.inputs[0].producer()
    masks = () if scores is None or scores.op_type != "Add" else scores.inputs
    return any(_is_finite_choice(value.producer()) for value in masks)


def _is_finite_choice(node: Any) -> bool:
    import numpy as np

    if node is None or node.op_type != "Where":
        return False
    constants = [value.const_value for value in node.inputs[1:]]
    return all(c is not None and bool(np.isfinite(c.numpy()).all()) for c in constants)


def _replace(graph: Any, node: Any, value: Any) -> None:
    """Let all that reads a node's output read another value, and take the node out."""
    import onnx_ir as ir

    old = node.outputs[0]
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
