"""Heads: the linears whose output is the model's, and not that of a block."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from peftsurgery.anatomy.flow import Flow
from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.values import backward


def find_heads(
    flow: Flow, vocabularies: Collection[int], taken: Collection[fx.Node]
) -> dict[fx.Node, str]:
    """The head linears of the top program by their y, with their roles.

    A linear whose output reaches an output of the model is ``lm_head`` if it has a row for every
    token of an embedding table (``vocabularies`` are the tables' sizes), else ``head``, unless an
    activation follows it (a pooler). ``taken`` are the y of linears with roles already.
    """
    heads: dict[fx.Node, str] = {}
    for output in flow.outputs:
        found = {linear.nodes["y"]: linear.facts["out"] for linear in flow.origin(output)}
        for y in found.keys() - taken:
            if found[y] in vocabularies:
                heads[y] = "lm_head"
            elif not _is_activated(y, output):
                heads[y] = "head"
    return heads


def _is_activated(y: fx.Node, output: fx.Node) -> bool:
    way = backward([output], lambda node: node is y)
    return any(has(node, Trait.ACTIVATION) for node in way if node is not y)
