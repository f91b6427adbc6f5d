"""The dtypes that cuts compute in, and casts between them and the model's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from peftsurgery.surgery.plan.cut import Cut

HALVES = (torch.bfloat16, torch.float16)


def has_number(dtype: torch.dtype, number: float) -> bool:
    """Whether a floating-point dtype has a number as it is, not rounded."""
    info = torch.finfo(dtype)
    digits = 2 * math.frexp(number)[0] / info.eps
    return number == 0 or (digits.is_integer() and info.tiny <= abs(number) <= info.max)


def compute_dtype(cut: Cut) -> torch.dtype:
    """Dtype a cut computes in: the widest of its parameters' and values'.

    A model in half precision trains its adapters in full precision.
    """
    dtypes = [getattr(torch, param.dtype) for param in cut.rule.params.values()]
    dtypes += [dtype_of(node) for node in cut.site.nodes.values() if is_float(node)]
    dtype: torch.dtype = dtypes[0] if dtypes else torch.float32
    for other in dtypes:
        dtype = torch.promote_types(dtype, other)
    return dtype


def cast(value: Any, source: torch.dtype | None, target: torch.dtype | None) -> Any:
    """Cast a value between floating-point dtypes; other dtypes stay."""
    if source is None or target is None or source == target:
        return value
    if not source.is_floating_point or not target.is_floating_point:
        return value
    return value.to(target)


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of the tensor that a node stands for."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def is_float(node: fx.Node) -> bool:
    """Whether a node stands for a tensor of floating-point numbers."""
    dtype = dtype_of(node)
    return dtype is not None and dtype.is_floating_point
