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

from peftsurgery.anatomy.ops import op, operands, words
from peftsurgery.reach import reach

PLACES = words("index indices mask condition")
"""What operators call the arguments that say where entries are, and not which."""


def plain(node: fx.Node) -> str:
    """The operator's name, without the underscore of one that writes in place."""
    name = op(node)
    return name.removesuffix("_") if not name.endswith("__") else name


def contents(node: fx.Node) -> list[fx.Node]:
    """Operands from which an operator's entries come: all but masks and indices."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return operands(node)
    names = [argument.name for argument in node.target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if plain(node) == "copy":
        del given["self"]
    kept: set[fx.Node] = set()
    fx.map_arg({name: given[name] for name in given.keys() - PLACES}, kept.add)
    return [value for value in operands(node) if value in kept]


def written(node: fx.Node) -> list[fx.Node]:
    """The values that are written in place into a tensor, or into a view of it."""
    # a write returns what it wrote to, so it is a view too
    parts = reach([node], lambda part: (user for user in part.users if _views(user, part)))
    writes = ((part, user) for part in parts for user in part.users if _writes(user, part))
    return [value for part, user in writes for value in contents(user) if value is not part]


def made_of(node: fx.Node, through: Callable[[fx.Node], bool] | None = None) -> Iterator[fx.Node]:
    """All values whose entries end up in one, ``through`` these operators alone if given.

    What was written into a value is followed whichever operator made it.
    """

    def sources(found: fx.Node) -> list[fx.Node]:
        is_followed = through is None or through(found)
        return [*written(found), *(contents(found) if is_followed else ())]

    return reach([node], sources)


def _writes(user: fx.Node, part: fx.Node) -> bool:
    """Whether an operator writes into a value, its first argument."""
    return user.args[:1] == (part,) and bool(getattr(_alias(user), "is_write", False))


def _views(user: fx.Node, part: fx.Node) -> bool:
    """Whether an operator's result may share the memory of its first argument."""
    return user.args[:1] == (part,) and (op(user) == "getitem" or _alias(user) is not None)


def _alias(node: fx.Node) -> object | None:
    """What the operator's schema says of the memory of its first argument."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.arguments:
        return None
    return node.target._schema.arguments[0].alias_info
