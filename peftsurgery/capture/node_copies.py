"""Copies of nodes, made in half the time that fx takes.

It searches the arguments of every copy for sizes that are no nodes; those of a node that there is
were searched when it was made.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx


def copy_node(graph: fx.Graph, node: fx.Node, value: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """Copy a node to where the graph is being made, with a ``value`` for every node it takes.

    As ``graph.node_copy`` does.
    """
    made = graph.create_node(node.op, node.target, name=node.name, type_expr=node.type)
    made.args = fx.map_arg(node.args, value)
    if node.kwargs:
        made.kwargs = fx.map_arg(node.kwargs, value)
    made.meta.update(node.meta)
    return made
