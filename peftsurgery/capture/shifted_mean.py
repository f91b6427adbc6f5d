"""A mean with a number added to it, which norms take the root of, by two operators for four.

    mean(x, [-1], True) + 1e-6   ->   addcdiv(1e-6, sum(x, -1, True), 512)

On the processor a mean is a sum that is divided by the count, so the quotient with the number added
has the bits of the sum of both. Numbers that are tensors already are bound in half the time. On
other devices, and in half precision, a mean is rounded in another way: there it is called as ever.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from peftsurgery.capture.schemas import arguments

aten = torch.ops.aten

_DTYPES = (torch.float32, torch.float64)


class ShiftedMean:
    """The mean over some axes of a value plus a number; it is a function of a graph."""

    __name__ = "shifted_mean"

    def __init__(self, dims: Sequence[int], keepdim: bool, count: int, number: float) -> None:
        """``count`` is how many entries each mean is of."""
        self.dims, self.keepdim, self.number = [*dims], keepdim, number
        self.made = {
            dtype: (
                torch.tensor(number, dtype=dtype, device="cpu"),
                torch.tensor(count, dtype=dtype, device="cpu"),
            )
            for dtype in _DTYPES
        }

    def __call__(self, value: Tensor) -> Tensor:
        """The mean and the number, in memory of its own."""
        made = self.made.get(value.dtype) if value.is_cpu else None
        if made is None:
            return torch.mean(value, self.dims, self.keepdim).add_(self.number)
        number, count = made
        return torch.addcdiv(number, torch.sum(value, self.dims, self.keepdim), count)


def shift_means(graph: fx.Graph) -> None:
    """Replace means that are read by the sum with a number alone."""
    for node in graph.find_nodes(op="call_function", target=aten.mean.dim):
        user = next(iter(node.users), None)
        shifted = None if user is None or len(node.users) > 1 else _shifted(node, user)
        if user is not None and shifted is not None:
            user.target, user.args = shifted, (node.args[0],)
            graph.erase_node(node)


def _shifted(mean: fx.Node, user: fx.Node) -> ShiftedMean | None:
    """What a mean and the sum that reads it compute, if that is a mean and a number."""
    given = arguments(mean)
    value = given["self"].meta.get("val")
    is_sum = user.target is aten.add.Tensor and user.args[0] is mean and not user.kwargs
    if not is_sum or not isinstance(value, Tensor) or given["dtype"] is not None:
        return None
    number, dims = user.args[1], given["dim"]
    if not isinstance(number, (int, float)) or not value.is_floating_point() or not dims:
        return None
    sizes = [value.shape[dim] for dim in dims]
    if not all(type(size) is int for size in sizes):
        return None
    return ShiftedMean(dims, given["keepdim"], math.prod(sizes), number)
