"""Defaults that are narrow, for slots of an onnx_ir.Model in which nothing is summed.

    y + MatMul(h, Transpose(B))     B is (out, rank), and (1, 0) where it is left out

A sum over a rank of 0 is 0. One column of zeros that is spread over y is the same sum as `out` of
them, which need not be written and read for it; and no operator is added. So an axis of a slot
without elements is 1 by default, where all that comes of it is spread over that axis of something
else.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peftsurgery.formats.onnx.calls import Tensors

SPREAD = 0
"""What has become of an axis (-1 is the last) that something else has in full."""
_BY_ELEMENT = frozenset({"Add", "Sub", "Mul"})


def narrowed(model: Any, defaults: Tensors) -> dict[str, Tensor]:
    """Let slots of a model be narrow where they can; their defaults, by name.

    An axis that may be narrow has a size of its own, ``features0`` and so on.
    """
    found, count = dict(defaults), 0
    for value in model.graph.inputs:
        default = defaults.get(value.name)
        if default is None or default.numel():
            continue
        for axis in range(default.ndim):
            passed = _passed(model.graph, value, axis) if default.shape[axis] > 1 else None
            if passed is not None:
                found[value.name] = default.narrow(axis, 0, 1)
                value.shape = value.shape.copy()
                value.shape[axis] = f"features{count}"
                count += 1
                for each in passed:
                    each.shape = None
                break
    return found


def _passed(graph: Any, slot: Any, axis: int) -> list[Any] | None:
    """The values that have an axis of a slot until it is spread; None if it is not."""
    passed, left = list[Any](), [(slot, axis - len(slot.shape))]
    while left:
        value, place = left.pop()
        if value.is_graph_output():
            return None
        for use in value.uses():
            to = _place_after(use.node, use.idx, value, place) if use.node.graph is graph else None
            if to is None:
                return None
            if to != SPREAD:
                passed += use.node.outputs
                left.append((use.node.outputs[0], to))
    return passed


def _place_after(node: Any, index: int, value: Any, axis: int) -> int | None:
    """Where an axis of one of a node's inputs is in its output; None if that cannot be said."""
    if value.shape is None or len(node.outputs) != 1:
        return None
    if node.op_type == "Transpose":
        order, count = node.attributes.get("perm"), len(value.shape)
        axes = [*reversed(range(count))] if order is None else [*order.as_ints()]
        return axes.index(axis + count) - count
    if node.op_type == "MatMul":
        return -1 if (index, axis) == (1, -1) and len(value.shape) > 1 else None
    other = node.inputs[1 - index] if node.op_type in _BY_ELEMENT else None
    if other is None or other is value or other.shape is None:
        return None
    size = other.shape[axis] if len(other.shape) >= -axis else 1
    return axis if size == 1 else SPREAD if isinstance(size, int) else None
