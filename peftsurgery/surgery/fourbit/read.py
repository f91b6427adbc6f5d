"""How graphs read packed weights.

A packed weight has the name that the weight had. A product with it becomes one node that unpacks
the weight, multiplies and forgets it; in the backward pass it does so again, so that no dense
weight outlives its product (as bitsandbytes' own layers do). Whatever else reads the weight reads
it unpacked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.capture.schemas import op
from peftsurgery.language.readings import in_dtype
from peftsurgery.surgery.fourbit.pack import PackedWeight, Recipe, unpack


def read_packed(graph: fx.Graph, stored: Mapping[str, PackedWeight]) -> None:
    """Rewrite a graph to read these weights, by their names in it, in packed form."""
    for node in list(graph.find_nodes(op="get_attr")):
        if str(node.target) not in stored:
            continue
        recipe, compute, adapter = stored[str(node.target)]
        dtype = node.meta["val"].dtype
        for user in list(node.users):
            with graph.inserting_before(user):
                if not _is_product(user, node):
                    new = graph.call_function(unpacked, (node, tuple(recipe), dtype))
                    new.meta = {**node.meta, "surgery": adapter}
                    user.replace_input_with(node, new)
                    continue
                position = user.args.index(node)
                args = (user.target, position, tuple(recipe), dtype, compute, *user.args)
                new = graph.call_function(multiplied, args)
            new.meta = {**user.meta, "surgery": adapter}
            user.replace_all_uses_with(new)
            graph.erase_node(user)


def _is_product(user: fx.Node, weight: fx.Node) -> bool:
    """Whether a node takes the weight, once and plainly, for a product or a look-up."""
    is_one = has(user, Trait.PRODUCT) or op(user) == "embedding"
    return is_one and not user.kwargs and user.args.count(weight) == 1


def unpacked(packed: torch.Tensor, recipe: tuple[Any, ...], dtype: torch.dtype) -> torch.Tensor:
    """The weight that these bytes are, in ``dtype``."""
    return unpack(packed, Recipe(*recipe)).to(dtype)


def multiplied(*call: Any) -> torch.Tensor:
    """A product with a packed weight, of the arguments of :func:`_multiply`."""
    result: torch.Tensor = _Multiplied.apply(*call)
    return result


def _multiply(
    product: Any,
    position: int,
    recipe: tuple[Any, ...],
    dtype: torch.dtype,
    compute: torch.dtype | None,
    *args: Any,
) -> torch.Tensor:
    """``product(*args)``, where ``args[position]`` are the bytes of a weight in ``dtype``.

    It is computed in ``compute``, if given, and returned in ``dtype``.
    """
    given = list(args)
    given[position] = unpacked(given[position], recipe, compute or dtype)
    if compute is None:
        return product(*given)
    return product(*(in_dtype(value, compute) for value in given)).to(dtype)


class _Multiplied(torch.autograd.Function):
    """A product that keeps the packed weight for its backward pass, not the dense one."""

    @staticmethod
    def forward(ctx: Any, *call: Any) -> torch.Tensor:
        ctx.call = [None if isinstance(value, torch.Tensor) else value for value in call]
        ctx.tensors = [i for i, value in enumerate(call) if isinstance(value, torch.Tensor)]
        ctx.save_for_backward(*(call[i] for i in ctx.tensors))
        kind = call[5 + call[1]].device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return _multiply(*call)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        call = list(ctx.call)
        wanted = {}
        for position, value in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            needed = ctx.needs_input_grad[position]
            call[position] = value.detach().requires_grad_() if needed else value
            if needed:
                wanted[position] = call[position]
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            result = _multiply(*call)
        found = dict(
            zip(wanted, torch.autograd.grad(result, [*wanted.values()], gradient), strict=True)
        )
        return tuple(found.get(position) for position in range(len(call)))
