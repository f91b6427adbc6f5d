"""Whether one graph serves train mode and eval mode: who asks a module for its ``training``, and how.

A dropout or a norm that asks passes the answer on as a flag of its operator, and a flag can follow
the module. Code that decides by it may compute anything else, so such code is looked at closely.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

# Modules and functions of torch, whose flags captures know how to follow, and torch.export itself.
_TORCH = str(Path(torch.__file__).parent)


@contextmanager
def noted_reads() -> Iterator[set[str]]:
    """Note where ``training`` is read in this thread by code that may decide by it.

    Every place is a file and a line. A read between two equal values (a dropout probability of 0 in
    either mode) decides nothing.
    """
    places: set[str] = set()
    nn.Module.training = _Watched(places)  # type: ignore[assignment]
    try:
        yield places
    finally:
        del nn.Module.training


class _Watched:
    """Stands for ``training`` of all modules: it is kept where it always is, and reads are noted."""

    def __init__(self, places: set[str]) -> None:
        self.places, self.thread = places, threading.get_ident()

    def __get__(self, module: nn.Module | None, kind: type) -> Any:
        if module is None:
            raise AttributeError("training")
        try:
            value = vars(module)["training"]
        except KeyError:
            raise AttributeError("training") from None
        if threading.get_ident() == self.thread:
            reader = sys._getframe(1)
            if _decides(reader):
                self.places.add(f"{reader.f_code.co_filename}:{reader.f_lineno}")
        return value

    def __set__(self, module: nn.Module, value: bool) -> None:
        vars(module)["training"] = value


def _decides(frame: FrameType) -> bool:
    """Whether code that reads ``training`` may do other things in one mode than in the other."""
    if frame.f_code.co_filename.startswith(_TORCH):
        return False
    choice = _choice(frame.f_code, frame.f_lasti)
    if choice is None:
        return True
    try:
        first, second = (eval(arm, frame.f_globals, frame.f_locals) for arm in choice)
    except (NameError, AttributeError):
        return True
    plain = isinstance(first, int | float) and isinstance(second, int | float)
    return not (plain and first == second)


@lru_cache(maxsize=4096)
def _choice(code: CodeType, instruction: int) -> tuple[CodeType, CodeType] | None:
    """The two values of ``a if self.training else b`` if this reads it; names and constants only."""
    try:
        lines, start = inspect.getsourcelines(code)
    except OSError:
        return None
    positions = list(code.co_positions())[instruction // 2]
    text = textwrap.dedent("".join(lines))
    indent = len(lines[0]) - len(lines[0].lstrip())
    line, column = positions[0], positions[2]
    if line is None or column is None:
        return None
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.IfExp):
            continue
        test = node.test.operand if isinstance(node.test, ast.UnaryOp) else node.test
        here = (test.lineno + start - 1, test.col_offset + indent)
        if (
            here == (line, column)
            and _is_dotted(test)
            and _is_plain(node.body)
            and _is_plain(node.orelse)
        ):
            return _compiled(node.body), _compiled(node.orelse)
    return None


def _compiled(node: ast.expr) -> CodeType:
    return compile(ast.Expression(node), "<choice>", "eval")


def _is_plain(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) or _is_dotted(node)


def _is_dotted(node: ast.expr) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)
