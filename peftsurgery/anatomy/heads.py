"""Heads: the linears whose output is the model's, and not that of a block."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from peftsurgery.anatomy.flow import Flow
from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.site import Site
from peftsurgery.anatomy.values import backward


def find_heads(flow: Flow, vocabularies: Iterable[int], taken: Iterable[Site]) -> dict[Site, str]:
    """The head linears of the top program, with their roles.

    A linear whose output reaches an output of the model is ``lm_head`` if it has a row for every
    token of an embedding table (``vocabularies`` are the tables' sizes), else ``head``, unless an
    activation follows it (a pooler). ``taken`` are linears with roles already.
    """
    counts, others = set(vocabularies), set(taken)
    heads: dict[Site, str] = {}
    for output in flow.outputs:
        for linear in flow.origin(output) - others:
            if linear.facts["out"] in counts:
                heads[linear] = "lm_head"
            elif not _is_activated(linear, output):
                heads[linear] = "head"
    return heads


def _is_activated(linear: Site, output: fx.Node) -> bool:
    y = linear.nodes["y"]
    way = backward([output], lambda node: node is y)
    return any(has(node, Trait.ACTIVATION) for node in way if node is not y)
