"""Contents of tensors: values that are written into them, in place or not.

    masked_fill(x, mask, 0)                x: what was asked where to write is not written
    where(mask, x, z)                      x and z
    y = x.new_zeros(n); y[1:] = x[:-1]     x, which is written into a view of y
    y.masked_fill_(mask, 0)                what y is

Writing in place leaves no edge from what is written to what reads it: the memory that was written
is found by the views of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import fx

from peftsurgery.anatomy.values import operands
from peftsurgery.capture.schemas import arguments, op, overwritten, shares_memory
from peftsurgery.reach import reach

POSITIONS = {"index", "indices", "mask", "condition"}
"""What operators call the arguments that say where entries are, and not which."""


def contents(node: fx.Node) -> list[fx.Node]:
    """Operands from which an operator's entries come: all but masks and indices."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return operands(node)
    given = arguments(node)
    if op(node) == "copy":
        del given["self"]
    kept: set[fx.Node] = set()
    fx.map_arg({name: given[name] for name in given.keys() - POSITIONS}, kept.add)
    return [value for value in operands(node) if value in kept]


def written(node: fx.Node) -> list[fx.Node]:
    """The values that are written in place into a tensor, or into a view of it."""
    # a write returns what it wrote to, so it is a view too
    parts = reach([node], lambda part: (user for user in part.users if _views(user, part)))
    writes = ((part, user) for part in parts for user in part.users if part in overwritten(user))
    return [value for part, user in writes for value in contents(user) if value is not part]


def made_of(node: fx.Node, through: Callable[[fx.Node], bool] | None = None) -> Iterator[fx.Node]:
    """All values whose entries end up in one, ``through`` these operators alone if given.

    What was written into a value is followed whichever operator made it.
    """

    def sources(found: fx.Node) -> list[fx.Node]:
        is_followed = through is None or through(found)
        return [*written(found), *(contents(found) if is_followed else ())]

    return reach([node], sources)


def _views(user: fx.Node, part: fx.Node) -> bool:
    """Whether an operator's result may share the memory of its first argument."""
    shares = op(user) == "getitem" or bool(shares_memory(user.target))
    return shares and user.args[:1] == (part,)
