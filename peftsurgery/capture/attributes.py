"""What a module keeps in Python's attributes, put back after its forward was looked at.

A forward may set attributes: a length it has seen, a table it made, a tensor it will want again. A
trace must leave none of that behind, least of all tensors without content.
"""

from __future__ import annotations

import operator
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from peftsurgery.capture.parts import named_parts
from peftsurgery.capture.tensors import is_plain, named_tensors

_CONTAINERS = (dict, list, deque, set)

# What a module has by itself, or is given for a trace; and by which transformers knows that it has
# hooked a model once and for all, to collect what is asked for.
_NOT_OWN = ("training", "forward", "_output_capturing_hooks_installed")
# What every module has: the tables of its weights, parts and hooks.
MODULE_TABLES = frozenset(vars(nn.Module()))

# Every attribute of every module, and what was in it if it is a container or a tensor.
Attributes = list[tuple[str, nn.Module, dict[str, tuple[Any, Any]]]]


@contextmanager
def kept_attributes(module: nn.Module) -> Iterator[None]:
    """Restore the Python attributes of all modules, and what they hold, on leaving the context."""
    before = attributes_of(module)
    try:
        yield
    finally:
        for _, part, attributes in before:
            _restore(part, attributes)


def attributes_of(module: nn.Module, copied: bool = True) -> Attributes:
    """Take a snapshot of the attributes of all modules.

    ``copied`` clones tensors and tables, to be restored.
    """
    return [
        (
            name,
            part,
            {
                key: (value, None if type(value) in _ATOMS else _content(key, value, copied))
                for key, value in vars(part).items()
            },
        )
        for name, part in named_parts(module)
    ]


def tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that a module tree holds, by name.

    Weights, attributes and items of containers.
    """
    for name, part in named_parts(module):
        for key, value in vars(part).items():
            if key not in MODULE_TABLES:
                yield from _tensors_in(f"{name}.{key}", value)
    yield from named_tensors(module)


def _tensors_in(name: str, value: Any, outer: tuple[int, ...] = ()) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (*_CONTAINERS, tuple)) and id(value) not in outer:
        for key, thing in _items(value):
            yield from _tensors_in(f"{name}.{key}", thing, (*outer, id(value)))


def _items(container: Any) -> Iterable[tuple[Any, Any]]:
    return container.items() if isinstance(container, dict) else enumerate(container)


@dataclass(frozen=True)
class _Content:
    """Snapshot of a container.

    ``things`` is a shallow copy, ``within`` snapshots of nested items.
    """

    things: Any
    within: tuple[tuple[Any, Any], ...]


# Most of what modules have: values that hold nothing, and tables that are empty.
_ATOMS = frozenset((type(None), bool, int, float, str, FunctionType, MethodType))
_EMPTY = {kind: _Content(kind(), ()) for kind in (*_CONTAINERS, tuple)}
_EMPTY[OrderedDict] = _EMPTY[dict]


def _content(key: str, value: Any, copied: bool, outer: tuple[int, ...] = ()) -> Any:
    """Snapshot of a tensor or container, at any depth.

    None for a value with no content to restore.
    """
    kind = type(value)
    if kind in _ATOMS:
        return None
    if kind in _EMPTY and not value:
        return _EMPTY[kind]
    if key in MODULE_TABLES and isinstance(value, dict):
        return _Content(dict(value), ()) if copied else None
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if copied and is_plain(value) else None
    if not isinstance(value, (*_CONTAINERS, tuple)) or id(value) in outer:
        return None
    within: list[tuple[Any, Any]] = []
    for _, thing in _items(value) if key not in MODULE_TABLES else ():
        is_deep = isinstance(thing, (*_CONTAINERS, tuple, torch.Tensor))
        if is_deep and not isinstance(thing, nn.Parameter):
            within.append((thing, _content(key, thing, copied, (*outer, id(value)))))
    kind = next((kind for kind in _CONTAINERS if isinstance(value, kind)), tuple)
    return _Content(kind(value), tuple(within))


def changed_since(before: Attributes) -> list[str]:
    """Names of the attributes that were set, or whose containers changed, since the snapshot."""
    return [
        f"{name}.{key}".lstrip(".")
        for name, part, attributes in before
        for key, value in vars(part).items()
        if key not in _NOT_OWN
        and not (key in attributes and _is_kept(key, value, *attributes[key]))
    ]


def _is_kept(key: str, value: Any, before: Any, content: Any) -> bool:
    is_same = value is before or _is_same(value, before)
    return is_same and (content is None or key in MODULE_TABLES or _is_unchanged(value, content))


def _is_same(value: Any, before: Any) -> bool:
    plain = isinstance(value, bool | int | float | str)
    return plain and type(value) is type(before) and bool(value == before)


def _is_unchanged(value: Any, content: Any) -> bool:
    """Whether a container and its nested containers still hold the same objects."""
    return not isinstance(content, _Content) or (
        _holds(value, content.things) and all(_is_unchanged(*pair) for pair in content.within)
    )


def _restore(part: nn.Module, before: dict[str, tuple[Any, Any]]) -> None:
    for value, content in before.values():
        if content is not None and (content is not _EMPTY.get(type(value)) or value):
            _put_back(value, content)
    own = {key: value for key, (value, _) in before.items()}
    if not _holds(vars(part), own):
        vars(part).clear()
        vars(part).update(own)


def _put_back(value: Any, content: Any) -> None:
    if isinstance(content, torch.Tensor):
        if not torch.equal(value, content):
            value.detach().copy_(content)
    elif isinstance(content, _Content):
        if not _holds(value, content.things):
            value.clear()
            (value.update if isinstance(value, dict | set) else value.extend)(content.things)
        for pair in content.within:
            _put_back(*pair)


def _holds(container: Any, content: Any) -> bool:
    """Whether a container's items are identical to those of the snapshot, in the same order."""
    if isinstance(container, set):
        return container == content
    if isinstance(container, dict):
        same_keys = list(container) == list(content)
        return same_keys and all(map(operator.is_, container.values(), content.values()))
    return len(container) == len(content) and all(map(operator.is_, container, content))
