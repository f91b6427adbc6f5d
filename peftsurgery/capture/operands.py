"""A product's operands as values of their own: a tensor given twice is given under two names.

An attention core whose keys are its values too can be cut at twice; a rule that changes one of
them must not change the other.
"""

from __future__ import annotations

import torch
from torch import fx

from peftsurgery.capture.schemas import op
from peftsurgery.capture.stack import inherit

PARTED = ("matmul", "bmm", "baddbmm", "mm", "scaled_dot_product_attention")


def part_operands(graph: fx.Graph) -> None:
    """Give each operand of a product or an attention core a name, where two of them are one."""
    for node in list(graph.nodes):
        if op(node) in PARTED:
            seen: set[fx.Node] = set()
            for position, operand in enumerate(node.args):
                if not isinstance(operand, fx.Node):
                    continue
                if operand in seen:
                    operand = _renamed(graph, node, operand)
                    node.update_arg(position, operand)
                seen.add(operand)


def _renamed(graph: fx.Graph, user: fx.Node, operand: fx.Node) -> fx.Node:
    with graph.inserting_before(user):
        made = graph.call_function(torch.ops.aten.alias.default, (operand,))
    made.meta["val"] = operand.meta.get("val")
    inherit(made, user)
    return made
