"""What a captured graph writes to: its own values and buffers, never what the user's model holds.

A captured model has buffers of its own, so it may count and average in them. Its parameters are the
user's memory, and so are tensors that a module keeps as plain attributes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import fx

from peftsurgery.capture.program import TensorInfo
from peftsurgery.errors import SurgeryError


def check_writes(graph: fx.Graph, tensors: Mapping[str, TensorInfo], name: str) -> None:
    """Refuse a graph that writes to a parameter or to a constant. PSG217."""
    for node in graph.nodes:
        for source in _written(node):
            root = _root(source)
            info = tensors.get(str(root.target)) if root.op == "get_attr" else None
            if root.op != "get_attr" or (info is not None and not info.parameter):
                continue
            what = (
                "a tensor that is no buffer" if info is None else f"its parameter '{root.target}'"
            )
            raise SurgeryError(
                "PSG217",
                f"{name} writes to {what} in its forward",
                "call the model once in this mode before capturing it, if it does so only once; "
                "register what it remembers as a buffer",
            )


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """The values that a node changes in place."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
        yield from (each for each in _nodes(value))


def _nodes(value: object) -> list[fx.Node]:
    if isinstance(value, fx.Node):
        return [value]
    return [each for each in value if isinstance(each, fx.Node)] if isinstance(value, list) else []


def _is_view(operator: torch._ops.OpOverload) -> bool:
    return any(each.alias_info is not None for each in operator._schema.returns)


def _root(node: fx.Node) -> fx.Node:
    """What a value is a view of, as far as the schemas of its operators say."""
    while node.op == "call_function" and node.all_input_nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and not _is_view(target):
            break
        node = node.all_input_nodes[0]
    return node
