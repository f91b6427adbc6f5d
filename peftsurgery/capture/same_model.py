"""Whether two models of files are captured alike: whether one capture serves both.

A capture depends on the classes of a model and the code that they call, on what its modules keep in
attributes, on the kind of its tensors and on the process. All of that is noted as it is when a
capture is made, and compared when a model of the same files is to be captured. What keeps hooks, a
forward or tensors with values of its own is not compared: such a model is captured anew.
"""

from __future__ import annotations

import operator
import os
import sys
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from peftsurgery.capture.equal_blocks.likeness import Token, TokenMaker
from peftsurgery.capture.equal_blocks.situations import told_of_attributes, told_of_tensors
from peftsurgery.capture.tensors import named_tensors
from peftsurgery.capture.watched import HOOKS
from peftsurgery.quiet import quiet

_TORCH = (torch.__name__, functional.__name__)


@dataclass(frozen=True)
class Told:
    """What a capture of a model depends on; ``kept`` keeps alive what is known by its identity."""

    model: Token
    names: list[str]
    code: list[Any]
    kept: list[Any]

    def agrees(self, other: Told) -> bool:
        """Whether the other model is captured as this one was."""
        return (
            self.names == other.names
            and len(self.code) == len(other.code)
            and all(map(operator.is_, self.code, other.code))
            and self.model == other.model
        )


@quiet()  # which is a global of transformers', and off at times
def told_of(module: nn.Module) -> Told | None:
    """What a capture of a module depends on, as it is now; None if it cannot be told."""
    if not isinstance(module, PreTrainedModel):
        return None
    parts = list(module.named_modules(remove_duplicate=False))
    if not all(tensor.is_meta for _, tensor in named_tensors(module)) or any(
        "forward" in vars(part) or any(vars(part)[hooks] for hooks in HOOKS) for _, part in parts
    ):
        return None
    tokens, which = TokenMaker(by_content=True), dict[int, int]()
    seen = [
        (
            *(name, which.setdefault(id(part), len(which)), tokens.of_class(type(part))),
            *(part.training, tuple(part._modules), sorted(part._non_persistent_buffers_set)),
            told_of_tensors(part._parameters, which),
            told_of_tensors(part._buffers, which),
        )
        for name, part in parts
    ]
    model = seen, told_of_attributes(parts, tokens), dict(os.environ)
    return Told(model, *_code_of(module), tokens.kept)


def _code_of(module: nn.Module) -> tuple[list[str], list[Any]]:
    """The names and values that are global to the code of a model and to what that calls.

    Modules that grow as they are used (transformers' lazy ones) have no code of their own.
    """
    kinds = {base for part in module.modules() for base in type(part).__mro__}
    roots = {_root(kind) for kind in kinds} - {"builtins", "torch"}
    todo = sorted({kind.__module__ for kind in kinds if _root(kind) in roots})
    known, names, things = {*todo, *_TORCH}, list[str](), list[Any]()
    todo += _TORCH
    while todo:
        home = todo.pop()
        found = sys.modules.get(home)
        if type(found) is not ModuleType:
            continue
        names.append(home)
        for name, value in list(vars(found).items()):
            if isinstance(value, ModuleType) and sys.modules.get(f"{home}.{name}") is value:
                continue  # it is there once it was imported
            names.append(name)
            things.append(value)
            if isinstance(value, FunctionType | type):
                if _root(value) not in roots:
                    continue
                if value.__module__ not in known:
                    known.add(value.__module__)
                    todo.append(value.__module__)
                _add(names, things, value, home)
            elif name[:2] != "__":
                _add_items(names, things, value)
    return names, things


def _add(names: list[str], things: list[Any], value: Any, home: str) -> None:
    """Add a function's code, or what is in a class of this module."""
    if isinstance(value, FunctionType):
        things.append(value.__code__)
    elif value.__module__ == home:
        for name, own in list(vars(value).items()):
            if name != "__slotnames__":  # noted when an object is copied first
                names.append(name)
                things.append(own)
                things.append(getattr(own, "__code__", None))
                _add_items(names, things, own)


def _add_items(names: list[str], things: list[Any], value: Any) -> None:
    """Add what a table holds, or a registry: an object of transformers that has tables."""
    kept = (
        vars(value).values()
        if _root(type(value)) == "transformers" and hasattr(value, "__dict__")
        else ()
    )
    for table in (value, *kept):
        if type(table) is dict:
            names += map(str, table)
            things += table.values()


def _root(thing: Any) -> str:
    return str(getattr(thing, "__module__", "") or "").partition(".")[0]
