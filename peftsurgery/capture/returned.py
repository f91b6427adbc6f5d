"""What a capture returns, in the original's type: its flat outputs put together again.

An output of transformers is a dict and an object at once, and its class checks its own fields for
every one that is made, which takes as long as a dozen small operators. What a capture returns has
the fields that it had when it was traced: it is put together without asking again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.utils import ModelOutput

Build = Callable[[Sequence[Any]], Any]
"""Makes the original's output of a capture's flat outputs."""

_CHECKED = ("__new__", "__post_init__", "__setattr__", "__setitem__")


def builder(spec: pytree.TreeSpec) -> Build:
    """What puts flat outputs together as ``spec`` says."""
    if spec.type is None or not _is_usual(spec.type):
        return lambda values: pytree.tree_unflatten(values, spec)
    children, names = spec.children(), tuple(spec.context)
    order = [field.name for field in fields(spec.type)]
    if any(not child.is_leaf() for child in children) or sorted(names, key=order.index) != [*names]:
        return lambda values: pytree.tree_unflatten(values, spec)
    return partial(_output, spec.type, dict.fromkeys(order), names)


def _is_usual(kind: Any) -> bool:
    """Whether a class is an output of transformers that is made as they all are."""
    if not (isinstance(kind, type) and issubclass(kind, ModelOutput) and is_dataclass(kind)):
        return False
    init: Any = kind.__init__
    is_generated = init.__code__.co_filename == "<string>"  # by dataclass
    return is_generated and all(getattr(kind, n) is getattr(ModelOutput, n) for n in _CHECKED)


def _output(kind: Any, blank: dict[str, None], names: tuple[str, ...], values: Any) -> Any:
    """An output with these values under these names, and None in its other fields."""
    if len(names) == 1 and not isinstance(values[0], Tensor):
        return kind(**dict(zip(names, values, strict=True)))  # which may hold all the fields
    made = kind.__new__(kind)
    attributes = vars(made)
    attributes.update(blank)
    for name, value in zip(names, values, strict=True):
        if value is not None:
            OrderedDict.__setitem__(made, name, value)
            attributes[name] = value
    return made
