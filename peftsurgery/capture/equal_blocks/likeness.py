"""What a Python value is, as a token: equal for two values that code cannot tell apart.

Plain values, containers, dtypes, enums and configs are told by what they hold; other objects by who
they are and what they hold; a function by its code, and by what its globals and its closure hold
now. What may keep something where it cannot be seen (an iterator, a generator of random numbers, an
object of another language) has a token that equals none.
"""

from __future__ import annotations

import dis
import enum
import functools
import gc
import inspect
import logging
import os
import re
import sys
import threading
import time
import types
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

from peftsurgery.capture.equal_blocks.size_questions import SYMBOLS, expression
from peftsurgery.capture.loops.model_range import ModelRange

Token = Any

# Code that keeps nothing between two calls of a block which would change what it computes.
_LIBRARIES = tuple(
    str(Path(module.__file__).parent) + os.sep
    for module in (torch, transformers, huggingface_hub, np, os)
    if module.__file__
)
_INSTALLED = f"{os.sep}site-packages{os.sep}"
# Ways to read an object's attributes that nothing can watch.
_HIDDEN = frozenset({"__dict__", "vars", "getattr_static", "__getattribute__", "__getstate__"})
_HIDDEN |= {
    "id",
    "open",
    "globals",
    "locals",
    "eval",
    "exec",
    "_getframe",
    "currentframe",
    "copy",
    "deepcopy",
}
_NAMED = frozenset(
    (bool, int, float, complex, str, bytes, range, torch.device, types.NoneType, types.EllipsisType)
)
_WHO = (
    *(types.MethodDescriptorType, types.WrapperDescriptorType),
    *(types.GetSetDescriptorType, types.MemberDescriptorType),
    *(logging.Logger, re.Pattern, torch.dtype, torch.layout, torch.memory_format),
    *(torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops._OpNamespace, np.dtype),
    ModelRange,
)
_WRAPPERS = (types.MethodType, functools.partial, staticmethod, classmethod, property)
_CONTAINERS = (tuple, list, dict, set, frozenset, OrderedDict, defaultdict, torch.Size)
# What tells of the moment, or of whoever calls.
_UNSTEADY = (time, sys, inspect, gc, threading)
_LIMIT = 20_000


# What every class has, and says nothing of what its code does.
_OF_CLASSES = frozenset(("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__"))


class _Plain:
    """A class whose objects keep all they have in their dictionary."""


def _is_plain(kind: type) -> bool:
    """Whether objects of a class are like that."""
    return (kind.__basicsize__, kind.__dictoffset__) == (
        _Plain.__basicsize__,
        _Plain.__dictoffset__,
    )


@lru_cache(maxsize=4096)
def is_library(path: str | None) -> bool:
    """Whether a source file is of torch, transformers, numpy or Python itself."""
    if path is None or path.startswith("<frozen "):
        return True
    library = next((root for root in _LIBRARIES if path.startswith(root)), None)
    return library is not None and _INSTALLED not in path.removeprefix(library)


class TokenMaker:
    """Tokens of one moment: what two values share is looked at once.

    ``by_content`` tells objects by what they hold, and not by who they are.
    """

    def __init__(self, by_content: bool = False) -> None:
        self._by_content = by_content
        self._known: dict[int, Token] = {}
        self._classes: dict[type, Token] = {}
        self.kept: list[Any] = []  # so that no other value has its identity
        self._open: set[int] = set()
        self._modules: list[types.ModuleType] = []
        self._count = 0

    def of(self, value: Any) -> Token:
        """The token of a value. A value in itself equals none, nor does one too large."""
        kind = type(value)
        if kind in _NAMED:
            return kind, repr(value)
        if isinstance(value, SYMBOLS):
            return expression(value)
        found = self._known.get(id(value))
        if found is not None:
            return found
        self._count += 1
        if id(value) in self._open and isinstance(value, types.FunctionType | type):
            return id(value)
        if id(value) in self._open or self._count > _LIMIT:
            return object()
        self._open.add(id(value))
        token = self._made(value)
        self._open.discard(id(value))
        self._known[id(value)] = token
        self.kept.append(value)
        return token

    def _made(self, value: Any) -> Token:
        kind = type(value)
        if kind in _CONTAINERS:
            return self._contents(value)
        if isinstance(value, torch.Tensor):
            return id(value), value._version
        if isinstance(value, types.BuiltinFunctionType | types.MethodWrapperType):
            return id(value), self.of(value.__self__)
        if isinstance(value, (*_WHO, enum.Enum)):
            return id(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self.of_class(value)
        if isinstance(value, types.ModuleType):
            return self._module(value, ())
        if isinstance(value, _WRAPPERS):
            return kind, self.of(_within(value))
        if isinstance(value, nn.Module) or not _is_plain(kind):
            return object()
        is_told = self._by_content or isinstance(value, PreTrainedConfig)
        who = None if is_told else id(value)
        return who, self.of_class(kind), self.of(vars(value))

    def _contents(self, value: Any) -> Token:
        kind = type(value)
        if isinstance(value, dict):
            made = value.default_factory if isinstance(value, defaultdict) else None
            return kind, made, tuple((self.of(key), self.of(value[key])) for key in value)
        tokens = [self.of(each) for each in value]
        return kind, frozenset(tokens) if isinstance(value, set | frozenset) else tuple(tokens)

    def of_class(self, kind: type) -> Token:
        """The token of a class: what in it, and in those it is made of, is no library's."""
        return kind, tuple(self._of_one_class(base) for base in kind.__mro__)

    def _of_one_class(self, kind: type) -> Token:
        found = self._classes.get(kind)
        if found is None:
            found = tuple((kind, name, self.of(value)) for name, value in _own_code(kind))
            self._classes[kind] = found
        return found

    def _function(self, function: types.FunctionType) -> Token:
        code = function.__code__
        if is_library(code.co_filename) and not function.__closure__:
            return id(function)
        if is_library(code.co_filename):
            return id(function), self._cells(function)
        names = _names(code)
        if names is None:
            return object()
        scope = function.__globals__
        held = [
            self._module(scope[name], names)
            if isinstance(scope[name], types.ModuleType)
            else self.of(scope[name])
            for name in names
            if name in scope
        ]
        rest = (function.__defaults__, function.__kwdefaults__, function.__dict__)
        return code, id(function), tuple(held), self.of(rest), self._cells(function)

    def _cells(self, function: types.FunctionType) -> Token:
        held: list[Token] = []
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # an empty one
                held.append(self.of(cell.cell_contents))
        return tuple(held)

    def _module(self, module: types.ModuleType, names: tuple[str, ...]) -> Token:
        """The token of a module of Python: with its values, and what code reads by these names."""
        if module in _UNSTEADY:
            return object()
        if is_library(getattr(module, "__file__", None)) or module in self._modules:
            return id(module)
        self._modules.append(module)
        held = tuple(
            self._module(value, names) if isinstance(value, types.ModuleType) else self.of(value)
            for name, value in vars(module).items()
            if name in names or (type(value) in (*_NAMED, *_CONTAINERS) and name[:2] != "__")
        )
        self._modules.pop()
        return id(module), held


def _within(value: Any) -> Any:
    """What a callable object or a property is made of."""
    if isinstance(value, property):
        return value.fget, value.fset, value.fdel
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords, vars(value)
    return value.__func__, getattr(value, "__self__", None)


@lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...] | None:
    """The names that code reads; None if it reads, or imports, what nothing can watch."""
    if _HIDDEN.intersection(code.co_names):
        return None
    if any(instruction.opname == "IMPORT_NAME" for instruction in dis.get_instructions(code)):
        return None
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _names(constant)
            if inner is None:
                return None
            names.update(inner)
    return tuple(sorted(names))


def _own_code(kind: type) -> Iterator[tuple[str, Any]]:
    """What a class has that is not a library's: all of it, or what can be put into a library's."""
    is_own = not _is_of_library(kind)
    for name, value in list(vars(kind).items()):
        if type(value) is types.FunctionType:
            is_told = is_own or not is_library(value.__code__.co_filename)
        else:
            is_told = is_own or type(value) in _NAMED
        if not is_told or name in _OF_CLASSES or isinstance(value, Standing):
            continue  # of what stands for others, a class's objects have one of their own
        if not (is_own and name.startswith("_abc_")):
            yield name, value


def _is_of_library(kind: type) -> bool:
    if kind.__module__ in sys.builtin_module_names:
        return True
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return file is not None and is_library(file)


class Standing:
    """A class's attribute that stands before its objects' own; ``shadowed`` is what was there."""

    shadowed: Any = None
