"""What a module keeps in Python's attributes, put back after its forward was looked at.

A forward may set attributes: a length it has seen, a table it made, a tensor it will want again. A
trace must leave none of that behind, least of all tensors without content.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .tensors import is_plain

_CONTAINERS = (dict, list, set)


# What a module has by itself, or is given for a trace.
_NOT_OWN = ("training", "forward")

# Every attribute of every module, and what was in it if it is a container or a tensor.
Attributes = list[tuple[str, nn.Module, dict[str, tuple[Any, Any]]]]


@contextmanager
def kept_attributes(module: nn.Module) -> Iterator[None]:
    """Within the context attributes may be set; behind it, all modules have those they had."""
    before = attributes_of(module)
    try:
        yield
    finally:
        for _, part, attributes in before:
            _restore(part, attributes)


def attributes_of(module: nn.Module) -> Attributes:
    """The attributes of all modules as they are."""
    return [
        (
            name,
            part,
            {key: (value, _content(value)) for key, value in vars(part).items()},
        )
        for name, part in module.named_modules()
    ]


def _content(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if is_plain(value) else None
    return value.copy() if isinstance(value, _CONTAINERS) else None


def changed_since(before: Attributes) -> list[str]:
    """The attributes that are others now, by name."""
    return [
        f"{name}.{key}".lstrip(".")
        for name, part, attributes in before
        for key, value in vars(part).items()
        if key not in _NOT_OWN and not (key in attributes and _is_same(value, attributes[key][0]))
    ]


def _is_same(value: Any, before: Any) -> bool:
    plain = isinstance(value, bool | int | float | str)
    return value is before or (plain and type(value) is type(before) and value == before)


def _restore(part: nn.Module, before: dict[str, tuple[Any, Any]]) -> None:
    for value, content in before.values():
        if content is None:
            continue
        if isinstance(value, torch.Tensor):
            if not torch.equal(value, content):
                value.detach().copy_(content)
        elif isinstance(value, list):
            value[:] = content
        elif not _holds(value, content):
            value.clear()
            value.update(content)
    own = {key: value for key, (value, _) in before.items()}
    if not _holds(vars(part), own):
        vars(part).clear()
        vars(part).update(own)


def _holds(container: Any, content: Any) -> bool:
    """Whether a dict or a set still has the very things in it that it had."""
    if isinstance(container, set):
        return container == content
    return list(container) == list(content) and all(
        container[key] is content[key] for key in container
    )
