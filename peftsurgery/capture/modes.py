"""Whether one graph serves train mode and eval mode: who asks a module for ``training``, and how.

A dropout or a norm that asks passes the answer on as a flag of its operator, and a flag can follow
the module. Code that chooses a rate by it is looked at closely, and code that decides by it may do
anything else: the source around every read says which it is.
"""

from __future__ import annotations

import ast
import copy
import inspect
import os
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType, NoneType
from typing import Any, cast

import torch
from torch import nn

from peftsurgery.capture.randomness import TRAIN_FLAGS

# Modules and functions of torch, whose flags captures know how to follow, and torch.export itself.
_TORCH = str(Path(torch.__file__).parent) + os.sep
# Spectral norms and their kin decide by it whether to go on with their iteration.
_DECIDING = str(Path(torch.__file__).parent / "nn" / "utils") + os.sep
_UNKNOWN = object()


@dataclass
class Reads:
    """How ``training`` was read: ``rates`` are chosen by it, or code ``decides`` by it at large."""

    rates: bool = False
    decides: bool = False


@contextmanager
def noted_reads() -> Iterator[Reads]:
    """Note how this thread's code reads ``training`` of modules, torch's own code aside.

    A dropout called as a function with it as its flag is no decision, nor is a choice between two
    equal values (a rate of 0 in either mode).
    """
    reads = Reads()
    type.__setattr__(nn.Module, "training", _TrainingFlag(reads))
    try:
        yield reads
    finally:
        type.__delattr__(nn.Module, "training")


class _TrainingFlag:
    """Stands for ``training`` of all modules: it is kept where it was, and reads are noted."""

    def __init__(self, reads: Reads) -> None:
        self.reads, self.thread = reads, threading.get_ident()

    def __get__(self, module: nn.Module | None, kind: type) -> Any:
        if module is None:
            raise AttributeError("training")
        try:
            value = vars(module)["training"]
        except KeyError:
            raise AttributeError("training") from None
        frame = sys._getframe(1)
        if threading.get_ident() == self.thread and not _is_torchs(frame):
            self._note(_read(frame.f_code, frame.f_lasti), frame)
        return value

    def __set__(self, module: nn.Module, value: bool) -> None:
        vars(module)["training"] = value

    def _note(self, read: _Read | None, frame: FrameType) -> None:
        if read is None:
            self.reads.decides = True
        elif not read.is_flag(frame) and not read.is_idle(frame):
            self.reads.rates |= read.chooses
            self.reads.decides |= not read.chooses


def called_with(attribute: str, frame: FrameType) -> Any:
    """The function that an attribute, which a frame reads now, is given to; None for other uses."""
    read = _read(frame.f_code, frame.f_lasti, attribute)
    return None if read is None or read.called is None else _value(read.called, frame)


def _is_torchs(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return file.startswith(_TORCH) and not file.startswith(_DECIDING)


@dataclass(frozen=True)
class _Read:
    """A read in the source, within the largest expression of names, constants and logic around it.

    ``values`` compute that expression in train mode and in eval mode, ``chooses`` is whether it is
    ``a if b else c``, and ``called`` the function that is given the read itself as an argument, at
    a ``position`` or by a name. ``names`` are the others in the expression, with their attributes.
    """

    values: tuple[CodeType, CodeType]
    chooses: bool
    called: CodeType | None
    position: int | str | None
    names: tuple[str, ...]

    def is_flag(self, frame: FrameType) -> bool:
        """Whether ``training`` is passed unchanged to a function's own train flag."""
        found = None if self.called is None else _value(self.called, frame)
        if not inspect.isfunction(found) or found.__module__ != nn.functional.__name__:
            return False
        names = dict(enumerate(inspect.signature(found).parameters))
        name = names.get(self.position) if isinstance(self.position, int) else self.position
        return name in TRAIN_FLAGS

    def is_idle(self, frame: FrameType) -> bool:
        """Whether both modes give an equal number, so that the read has no effect."""
        if not all(_is_simple(name, frame) for name in self.names):
            return False  # computing it might run code, or ask a traced tensor for its value
        one, other = (_value(code, frame) for code in self.values)
        return isinstance(one, bool | int | float) and type(one) is type(other) and one == other


def _value(code: CodeType, frame: FrameType) -> Any:
    """Evaluate an expression in a frame; None if it cannot be evaluated safely."""
    try:
        return eval(code, frame.f_globals, frame.f_locals)
    except (NameError, AttributeError, TypeError, KeyError):
        return None


@lru_cache(maxsize=4096)
def _read(code: CodeType, instruction: int, attribute: str = "training") -> _Read | None:
    """The read that an instruction makes, as the source has it; None if it cannot be found."""
    try:
        lines, start = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError):
        return None
    indent = len(lines[0]) - len(lines[0].lstrip())
    line, _, column, _ = list(code.co_positions())[instruction // 2]
    outer = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in (each for each in outer if isinstance(each, ast.Attribute)):
        is_read = node.attr == attribute and _is_plain(node)
        if is_read and (node.lineno + start - 1, node.col_offset + indent) == (line, column):
            return _described(node, outer)
    return None


def _described(node: ast.expr, outer: dict[ast.AST, ast.AST]) -> _Read:
    whole: ast.expr = node
    while isinstance(outer[whole], ast.expr) and _is_plain(outer[whole]):
        whole = cast("ast.expr", outer[whole])
    values = tuple(_compiled(_With(node, value).visit(whole)) for value in (True, False))
    call = outer[node] if isinstance(outer[node], ast.Call) else outer[outer[node]]
    called = call.func if isinstance(call, ast.Call) and _is_argument(node, call) else None
    named = called is not None and _is_plain(called)
    return _Read(
        cast("tuple[CodeType, CodeType]", values),
        isinstance(whole, ast.IfExp),
        _compiled(cast("ast.expr", called)) if named else None,
        _position(node, call) if isinstance(call, ast.Call) and named else None,
        tuple(_names(whole, node)),
    )


def _names(within: ast.AST, read: ast.expr) -> Iterator[str]:
    """The names, with their attributes, in an expression, the read itself aside."""
    if within is read:
        return
    if isinstance(within, ast.Name | ast.Attribute):
        yield ast.unparse(within)
        return
    for child in ast.iter_child_nodes(within):
        yield from _names(child, read)


def _is_simple(name: str, frame: FrameType) -> bool:
    """Whether a name stands for a plain value, found without running any code (a property's)."""
    first, *attributes = name.split(".")
    value = frame.f_locals.get(first, frame.f_globals.get(first, _UNKNOWN))
    for attribute in attributes:
        parts = vars(value)["_modules"] if isinstance(value, nn.Module) else {}
        value = parts.get(attribute, inspect.getattr_static(value, attribute, _UNKNOWN))
    return type(value) in (bool, int, float, str, NoneType)


def _position(node: ast.expr, call: ast.Call) -> int | str | None:
    """Position or keyword of the argument in the call; None if it cannot be determined."""
    if node not in call.args:
        return next(keyword.arg for keyword in call.keywords if keyword.value is node)
    position = call.args.index(node)
    is_open = any(isinstance(argument, ast.Starred) for argument in call.args[:position])
    return None if is_open else position


def _is_argument(node: ast.expr, call: ast.Call) -> bool:
    return node in call.args or any(node is keyword.value for keyword in call.keywords)


class _With(ast.NodeTransformer):
    """Substitutes a constant for one node in a copy of a syntax tree."""

    def __init__(self, node: ast.expr, value: bool) -> None:
        self.node, self.value = node, value

    def visit(self, node: ast.AST) -> Any:
        """The node, or what is in its place."""
        if node is self.node:
            return ast.copy_location(ast.Constant(self.value), node)
        return self.generic_visit(copy.copy(node))


def _compiled(node: ast.expr) -> CodeType:
    return compile(ast.Expression(node), "<read>", "eval")


def _is_plain(node: ast.AST) -> bool:
    """Whether an expression is made of names, attributes, constants and logic only."""
    kinds = (ast.Name, ast.Attribute, ast.Constant, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp)
    words = (ast.expr_context, ast.unaryop, ast.boolop, ast.cmpop)
    return isinstance(node, kinds) and all(
        _is_plain(child) or isinstance(child, words) for child in ast.iter_child_nodes(node)
    )
