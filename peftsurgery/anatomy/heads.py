"""Heads: the linears whose output is the model's, and not that of a block."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from peftsurgery.anatomy.embeddings import given_ids
from peftsurgery.anatomy.flow import Flow
from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.site import Site
from peftsurgery.anatomy.values import backward, sizes


def find_heads(
    flow: Flow, tables: Collection[Site], taken: Collection[fx.Node]
) -> dict[fx.Node, str]:
    """The head linears of the top program by their y, with their roles.

    A linear whose output reaches an output of the model is ``lm_head`` if it says a number for
    every token that there is, else ``head``, unless an activation follows it (a pooler).
    ``tables`` are the model's embeddings of tokens, ``taken`` the y of linears with roles already.
    """
    heads: dict[fx.Node, str] = {}
    for output in flow.outputs:
        found = {linear.nodes["y"]: linear for linear in flow.origin(output)}
        for y in found.keys() - taken:
            if _is_of_tokens(found[y], tables):
                heads[y] = "lm_head"
            elif not _is_activated(y, output):
                heads[y] = "head"
    return heads


def _is_of_tokens(linear: Site, tables: Collection[Site]) -> bool:
    """Whether a linear has a row for every token: as many as a table has entries, or about so.

    Tables have entries for what is read and never said (images, prompts, the start). At each token
    that the model reads, such a linear makes more numbers than it is given.
    """
    rows, y = linear.facts["out"], linear.nodes["y"]
    if any(rows == table.facts["in"] for table in tables):
        return True
    read = [table.nodes["x"] for table in tables]
    texts = [sizes(ids) for ids in (*read, *map(given_ids, read)) if ids is not None]
    return bool(rows > linear.facts["in"]) and sizes(y)[:-1] in texts


def _is_activated(y: fx.Node, output: fx.Node) -> bool:
    way = backward([output], lambda node: node is y)
    return any(has(node, Trait.ACTIVATION) for node in way if node is not y)
