"""What code asks of symbolic sizes while a block is traced, and whether it would be told the same.

A trace learns of sizes: where code asks whether a size is above one, it decides for the example and
knows it from then on, and two sizes that had to be equal become one. An equal block that comes
later is asked with more known. It does the same if every question still has the answer that it had.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_QUESTIONS = ("evaluate_expr", "_maybe_evaluate_static", "guard_or_defer_runtime_assert")


class Questions:
    """The questions that are asked within the context, of the sizes of one trace."""

    def __init__(self, shapes: Any) -> None:
        self.shapes = shapes
        self.asked: dict[Any, Any] = {}
        self._before: dict[str, Any] = {}
        self._is_asking = False

    def __enter__(self) -> Questions:
        own = vars(self.shapes)
        self._before = {name: own[name] for name in _QUESTIONS if name in own}
        own |= {name: self._noting(name, getattr(self.shapes, name)) for name in _QUESTIONS}
        return self

    def __exit__(self, *error: object) -> None:
        own = vars(self.shapes)
        for name in _QUESTIONS:
            own.pop(name)
        own |= self._before

    def _noting(self, name: str, ask: Any) -> Any:
        def note(expression: Any, *args: Any, **kwargs: Any) -> Any:
            outer, self._is_asking = self._is_asking, True
            try:
                answer = ask(expression, *args, **kwargs)
            finally:
                self._is_asking = outer
            if not outer:  # what a question asks by itself is its own affair
                key = name, expression, args, tuple(sorted(kwargs.items())), _taken_for()
                self.asked.setdefault(key, _taken(answer, key[-1]))
            return answer

        vars(note)["cache_clear"] = getattr(ask, "cache_clear", None)  # as of a cached method
        return note

    def have_same_answers(self) -> bool:
        """Whether all questions would be answered now as they were; nothing is learnt by it."""
        with self.shapes.suppress_guards():
            return all(
                _taken(self._now(name, *asked), unknown) == answer
                for (name, *asked, unknown), answer in self.asked.items()
            )

    def _now(self, name: str, expression: Any, args: Any, kwargs: Any) -> Any:
        ask = getattr(type(self.shapes), name)  # not noted where a block around is traced
        return ask(self.shapes, self.shapes.replace(expression), *args, **dict(kwargs))

    def are_settled(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether what is known now makes no size of these nodes simpler than it is."""
        sizes = {size for node in nodes for size in _sizes(node.meta.get("val"))}
        return all(self.shapes.simplify(size) == size for size in sizes)


def expression(size: Any) -> Any:
    """A size as a value: a number, or an expression of the trace's symbols."""
    return (type(size), size.node.expr) if isinstance(size, SYMBOLS) else size


def _taken_for() -> bool | None:
    """What whoever asks takes an unknown answer for; None if it is told from the others."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_name == "note":
        frame = frame.f_back  # of the block around
    if frame.f_code.co_name != "_static_eval_sym_bool" or frame.f_back is None:
        return None
    asking = frame.f_back
    default = asking.f_locals.get("default") if asking.f_code.co_name == "_guard_or" else None
    known = {"statically_known_true": False, "statically_known_false": True, "_guard_or": default}
    return known.get(asking.f_code.co_name)


def _taken(answer: Any, unknown: bool | None) -> Any:
    """The answer as it is understood."""
    if unknown is None:
        return answer
    return unknown if answer is None else bool(answer)


def _sizes(value: Any) -> Iterable[Any]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield from _sizes((*leaf.shape, *leaf.stride(), leaf.storage_offset()))
        elif isinstance(leaf, SYMBOLS):
            yield leaf.node.expr
