"""The input sizes a capture is exact for, as conditions a call can be checked against.

While it traces, torch.export decides ``if x.shape[1] > 64`` for the example it sees, and notes what
it decided: bounds of sizes, equal sizes, and any other relation. These notes become conditions,
written as Python over the inputs by name (``x.shape[1] <= 64``): readable in a report, and compiled
once. What was decided by the values of a mask is one more (``keeps_all(attention_mask)``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import sympy
import torch
from torch import fx
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.value_ranges import ValueRanges

from peftsurgery.capture.tensors import is_plain

_AXIS = re.compile(r"\b(\w+)\.shape\[(\d+)\]")

Check = Callable[..., tuple[bool, ...]]


def size_conditions(
    graph: fx.Graph, ranges: Mapping[sympy.Symbol, ValueRanges[sympy.Expr]]
) -> tuple[str, ...]:
    """What an exported graph assumes of its inputs' sizes; assumptions about values are left out.

    ``ranges`` are the bounds that the export found for its symbols.
    """
    axes = list(_axes(graph))
    names: dict[sympy.Symbol, sympy.Symbol] = {}
    for here, size in axes:
        if isinstance(size, sympy.Symbol):
            names.setdefault(size, here)
    found: list[sympy.Basic] = []
    for here, size in axes:
        if names.get(size) is here:
            bounds = ranges.get(size, ValueRanges(0, int_oo))
            found += _bounds(here, bounds)
        else:
            found.append(sympy.Eq(here, size.xreplace(names), evaluate=False))
    for condition in _asserted(graph):
        if condition.free_symbols <= names.keys():
            found.append(condition.xreplace(names))
    texts = (PythonPrinter().doprint(condition) for condition in found if condition != sympy.true)
    return tuple(dict.fromkeys(texts))


def shape_texts(graph: fx.Graph, shape: Sequence[Any]) -> tuple[str, ...]:
    """Sizes in the symbols of a graph's inputs, as Python over the inputs by name."""
    names: dict[sympy.Symbol, sympy.Symbol] = {}
    for here, size in _axes(graph):
        if isinstance(size, sympy.Symbol):
            names.setdefault(size, here)
    printer = PythonPrinter()
    return tuple(printer.doprint(_expression(size).xreplace(names)) for size in shape)


def with_shapes(conditions: Sequence[str], shapes: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The conditions where inputs have these sizes, each given as a text."""

    def size(match: re.Match[str]) -> str:
        known = shapes.get(match[1])
        return match[0] if known is None else _bracketed(known[int(match[2])])

    found = (_AXIS.sub(size, condition) for condition in conditions)
    return tuple(text for text in found if len(set(text.split(" == "))) > 1 or " == " not in text)


def _bracketed(text: str) -> str:
    return text if re.fullmatch(r"[\w.\[\]]+", text) else f"({text})"


def compile_check(names: Sequence[str], conditions: Sequence[str]) -> Check:
    """A function of the inputs that evaluates every condition."""
    body = "".join(f"({condition}), " for condition in conditions)
    return cast("Check", eval(f"lambda {', '.join(names)}: ({body})", {"keeps_all": keeps_all}))


def keeps_all(mask: torch.Tensor) -> bool:
    """Whether a mask of tokens masks none. One without content is taken for such a mask."""
    return not is_plain(mask) or bool(mask.all())


def evaluate_sizes(
    names: Sequence[str], texts: Sequence[str], leaves: Sequence[Any]
) -> tuple[int, ...]:
    """The sizes that texts say, for inputs of these names."""
    return tuple(int(size) for size in compile_check(names, texts)(*leaves))


def is_limit(condition: str) -> bool:
    """Whether a condition fixes or excludes a value of one size, or bounds it above."""
    return re.fullmatch(r"\w+\.shape\[\d+\] (==|!=|<=) \d+", condition) is not None


def _axes(graph: fx.Graph) -> list[tuple[sympy.Symbol, sympy.Expr]]:
    """Every axis of every tensor input: its name in conditions, and its size."""
    return [
        (sympy.Symbol(f"{node.name}.shape[{axis}]", integer=True), _expression(size))
        for node in graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), torch.Tensor)
        for axis, size in enumerate(node.meta["val"].shape)
    ]


def _bounds(name: sympy.Symbol, bounds: ValueRanges[sympy.Expr]) -> list[sympy.Basic]:
    if bounds.is_singleton():
        return [sympy.Eq(name, bounds.lower, evaluate=False)]
    low = [sympy.Ge(name, bounds.lower, evaluate=False)] if bounds.lower > 0 else []
    high = [sympy.Le(name, bounds.upper, evaluate=False)] if bounds.upper < int_oo else []
    return [*low, *high]


def _asserted(graph: fx.Graph) -> list[sympy.Basic]:
    """The relations between sizes that the graph asserts when it runs."""
    target = torch.ops.aten._assert_scalar.default
    claims = [node.args[0] for node in graph.find_nodes(op="call_function", target=target)]
    values = [claim.meta.get("val") for claim in claims if isinstance(claim, fx.Node)]
    return [_expression(value) for value in values if isinstance(value, torch.SymBool)]


def as_known(size: Any) -> Any:
    """A size as a number, or as arithmetic on symbols if it varies."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    found, ranges = size.node.expr, size.node.shape_env.var_to_range
    known = {symbol: ranges[symbol] for symbol in found.free_symbols if symbol in ranges}
    found = found.xreplace({s: r.lower for s, r in known.items() if r.is_singleton()})
    return int(found) if found.is_number else found


def _expression(value: Any) -> Any:
    """The sympy expression of a size or condition, as far as it is not known as a number."""
    if isinstance(value, torch.SymInt | torch.SymBool):
        return value.node.expr
    return sympy.sympify(value)


_RELATIONS = {
    "!=": "other than",
    "==": "exactly",
    "<=": "at most",
    ">=": "at least",
    "<": "less than",
    ">": "more than",
}
_SIMPLE = re.compile(rf"\s*(\w+)\.shape\[(\d+)\]\s*({'|'.join(_RELATIONS)})\s*(-?\d+)\s*")


def in_words(condition: str) -> str:
    """A condition of one size in words; one of several as it is.

    ``x.shape[1] != 1``: exact where dimension 1 of x is other than 1; for others it is captured
    again.
    """
    found = _SIMPLE.fullmatch(condition)
    if found is None:
        return f"exact where {condition}; for others it is captured again"
    name, dim, relation, number = found.groups()
    size = f"{_RELATIONS[relation]} {number}"
    return f"exact where dimension {dim} of {name} is {size}; for others it is captured again"
