"""What torch says of the operators that a graph calls: names, arguments, what is done to memory.

Told by their schemas, so it holds for operators that nobody here has heard of. What an operator
means (a product, an activation) no schema says: that is the table in ``anatomy.ops``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx


def op(node: fx.Node) -> str:
    """The operator's name (``view``, ``add`` for ``aten.add_.Tensor``); "" for what calls none.

    Without namespace and overload, and without the underscore of one that writes in place.
    """
    return name_of(node.target) if node.op == "call_function" else ""


@cache
def name_of(target: Any) -> str:
    """The name of an operator, as ``op`` gives it."""
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    name = str(getattr(packet, "__name__", packet))
    return name if name.endswith("__") else name.removesuffix("_")


def arguments(node: fx.Node) -> dict[str, Any]:
    """What a node gives for every argument of its operator, by the schema's names."""
    return bind(node.target, node.args, node.kwargs)


def bind(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a call gives for every argument of an operator: its default where it gives none.

    Arguments without a default are None where they are not given. Of a function that is no operator
    of torch, what is given by name.
    """
    defaults = _defaults(target)
    return {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}


@cache
def _defaults(target: Any) -> Mapping[str, Any]:
    if not isinstance(target, torch._ops.OpOverload):
        return {}
    return {argument.name: argument.default_value for argument in target._schema.arguments}


def writes(target: Any) -> bool:
    """Whether an operator changes some argument in place."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def overwritten(node: fx.Node) -> Iterator[fx.Node]:
    """The values that a node changes in place."""
    target: Any = node.target
    if writes(target):
        given = arguments(node)
        for argument in target._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = given[argument.name]
                several = value if isinstance(value, (list, tuple)) else [value]
                yield from (each for each in several if isinstance(each, fx.Node))


def shares_memory(target: Any) -> bool | None:
    """Whether a result may be, or be a view of, an argument; None where no schema says it."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    return any(result.alias_info is not None for result in target._schema.returns)
