"""Which sizes of a call a capture leaves free, and when images get one size after all.

What cuts windows out of an image pads it to whole ones, stage by stage: a size is then arithmetic
on arithmetic, and torch.export takes minutes over it or gives up. Sizes of images are given up
there: the capture is for one, and another one is captured when it comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.export import Dim
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

LIMIT = 32
"""Arithmetic operations in one size. Convolutions with strides need some ten, windows of windows
over thirty; torch.export takes longer the more there are, from about this number on in minutes."""


class TangledSizesError(Exception):
    """A size is made of those of an image by more than LIMIT operations."""


def has_free_images(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the sizes of images may vary in a call.

    Not in a model of transformers, whose config fixes them.
    """
    return not isinstance(module, PreTrainedModel) and any(map(is_image, tensors.values()))


def is_image(value: Any) -> bool:
    """Whether a value is a batch of images, or of what else has two axes of places."""
    return isinstance(value, torch.Tensor) and value.ndim >= 4 and value.is_floating_point()


def check_sizes(made: torch.Tensor) -> None:
    """Raise TangledSizesError for a tensor of a size that takes too much arithmetic."""
    for size in made.shape:
        if isinstance(size, torch.SymInt) and size.node.expr.count_ops() > LIMIT:
            raise TangledSizesError(str(size))


def dynamic_shapes(value: Any, images_vary: bool) -> Any:
    """Every axis of every tensor may vary, as far as the model lets it, but for sizes of one.

    Of images only the batch may, unless ``images_vary``.
    """
    if isinstance(value, torch.Tensor):
        axes = 1 if is_image(value) and not images_vary else value.ndim
        return {axis: Dim.AUTO for axis in range(axes) if value.shape[axis] != 1}
    if isinstance(value, dict):
        return {key: dynamic_shapes(item, images_vary) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(dynamic_shapes(item, images_vary) for item in value)
    node = pytree.SUPPORTED_NODES.get(type(value))
    if node is None:
        return None
    children, _ = node.flatten_fn(value)
    return [dynamic_shapes(child, images_vary) for child in children]
