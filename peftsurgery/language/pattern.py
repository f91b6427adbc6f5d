"""Patterns: an expression with free names, looked for in a graph of ATen operations.

``mul(silu(linear(x, gate)), linear(x, up))`` finds every gated feed-forward, whatever computes it.
Each operator stands for the ATen operations of its entry in the table. Commutative operators match
in either order; a name that is repeated must be the same value each time; an argument that the
pattern leaves out (a bias) may be anything; casts that a model has in between are looked through.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from peftsurgery.anatomy.ops import Trait, has, meaning
from peftsurgery.anatomy.values import parameter_of, shape
from peftsurgery.capture.schemas import op, writes
from peftsurgery.errors import SurgeryError
from peftsurgery.language.expression import Expression, check_calls, spelling
from peftsurgery.language.operators import OPERATORS, Operator

MAX_STEPS = 200_000

_SIGNS: Mapping[type[ast.AST], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.MatMult: "matmul",
    ast.Pow: "pow",
    ast.USub: "neg",
}

Bindings = dict[str, Any]


@dataclass(frozen=True)
class Name:
    """Any value, bound to this name."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Number:
    """One number, as a constant of the graph."""

    value: float

    def __str__(self) -> str:
        return f"{self.value:g}"


@dataclass(frozen=True)
class Applied:
    """An operator applied to patterns, by position."""

    operator: Operator
    arguments: tuple[Name | Number | Applied, ...]

    def __str__(self) -> str:
        return f"{self.operator.name}({', '.join(map(str, self.arguments))})"

    def parts(self) -> Iterator[Name | Number | Applied]:
        """The pattern and all that it is made of, in the order in which they are looked for."""
        yield self
        for argument in self.arguments:
            yield from argument.parts() if isinstance(argument, Applied) else (argument,)


@dataclass(frozen=True, eq=False)
class Match:
    """One occurrence: the node that computes the pattern, and what each free name is there.

    ``turned`` are the names of weights of linears that the graph holds as (in, out).
    """

    root: fx.Node
    bindings: Mapping[str, Any]
    turned: frozenset[str] = frozenset()


def compile_pattern(expression: Expression) -> Applied:
    """Compile an expression into a pattern. Raises PSG114, PSG115 or PSG144 if it is none."""
    check_calls(expression, OPERATORS)
    pattern = _compile(expression, expression.tree)
    if not isinstance(pattern, Applied):
        raise _refuse(expression, "it must be an operator at its root")
    if "y" in expression.names:
        raise _refuse(expression, "'y' is the value of the whole pattern; use another name")
    return pattern


def find_pattern(expression: Expression, graph: fx.Graph) -> list[Match]:
    """Every occurrence of the pattern, in the graph's order; ``y`` is bound to its root.

    Nodes that surgery inserted (``meta["surgery"]``) are nobody's match.
    """
    pattern = compile_pattern(expression)
    matches = []
    for node in graph.nodes:
        if not has(node, Trait.CAST) and "surgery" not in node.meta:
            found = next(_Search(expression).match(pattern, node, {}), None)
            if found is not None:
                turned = frozenset(n for n, value in found.items() if isinstance(value, _Turned))
                plain = {n: found[n].node if n in turned else found[n] for n in found}
                matches.append(Match(node, {**plain, "y": node}, turned))
    return matches


def nearest_miss(expression: Expression, graph: fx.Graph) -> tuple[fx.Node, str] | None:
    """Node that computes most of the pattern, and what it lacks; None if nothing is near.

    Nearest is where the search went furthest through the parts of the pattern, from the left.
    """
    pattern = compile_pattern(expression)
    order = {id(part): number for number, part in enumerate(pattern.parts())}
    best, found = 0, None
    for node in graph.nodes:
        search = _Search(expression, order)
        if "surgery" in node.meta or next(search.match(pattern, node, {}), None) is not None:
            continue
        if search.furthest > best:
            best, (part, value) = search.furthest, search.failed
            found = node, f"'{part}' of the pattern is {_described(value)} there"
    return found


def _described(value: Any) -> str:
    """A value of a graph in a few words."""
    if not isinstance(value, fx.Node):
        return f"{value!r:.40}"
    return op(value) or {"get_attr": "a parameter"}.get(value.op, "a value from outside")


@dataclass(frozen=True)
class _Turned:
    """A weight of a linear, held as (in, out)."""

    node: fx.Node


class _Search:
    """One search from one root, bounded in steps.

    ``order`` numbers the parts of the pattern, by identity; the furthest of those that failed, with
    the value that it is not, is kept.
    """

    def __init__(self, expression: Expression, order: Mapping[int, int] | None = None) -> None:
        self.expression, self.steps, self.order = expression, 0, order or {}
        self.furthest = 0
        self.failed: tuple[Any, Any] = None, None

    def match(
        self, pattern: Name | Number | Applied, value: Any, bound: Bindings
    ) -> Iterator[Bindings]:
        """Every way to bind the names of ``pattern`` so that it is ``value``."""
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise _refuse(self.expression, "it takes too many steps to search for")
        reached = self.order.get(id(pattern), 0)
        if reached > self.furthest:
            self.furthest, self.failed = reached, (pattern, value)
        if isinstance(pattern, Name):
            yield from _bind(pattern.name, value, bound)
        elif isinstance(pattern, Number):
            same = isinstance(value, int | float) and float(value) == pattern.value
            yield from (bound,) * same
        else:
            for arguments in _spellings(pattern, value):
                yield from self.match_all(pattern.arguments, arguments, bound)

    def match_all(
        self, patterns: tuple[Any, ...], values: tuple[Any, ...], bound: Bindings
    ) -> Iterator[Bindings]:
        if not patterns:
            yield bound
            return
        for further in self.match(patterns[0], values[0], bound):
            yield from self.match_all(patterns[1:], values[1:], further)


def _spellings(pattern: Applied, value: Any) -> Iterator[tuple[Any, ...]]:
    """The argument lists by which ``value`` is a call of the pattern's operator."""
    wanted = len(pattern.arguments)
    for node in _through_casts(value):
        arguments = _arguments(pattern.operator, node)
        if arguments is None or len(arguments) < wanted:
            continue
        yield arguments[:wanted]
        if pattern.operator.commutative and wanted == 2:
            yield arguments[1], arguments[0]
        return


def _arguments(operator: Operator, node: fx.Node) -> tuple[Any, ...] | None:
    """A node's arguments in the operator's order, if the operator can stand for it."""
    if writes(node.target) or any(
        value not in (None, 1, False, "none") for value in node.kwargs.values()
    ):
        return None  # a variant, such as gelu by tanh or an addition scaled by alpha
    if op(node) in operator.aten:
        return tuple(node.args)
    if "linear" in operator.aten and meaning(node).turned:
        x, weight, *bias = (node.args[i] for i in meaning(node).operands)
        matrix, flipped = parameter_of(weight)
        if matrix is not None and len(shape(matrix)) == 2:
            return (x, matrix if flipped else _Turned(matrix), *bias)
    return None


def _bind(name: str, value: Any, bound: Bindings) -> Iterator[Bindings]:
    if name not in bound:
        yield {**bound, name: value}
    elif _core(bound[name]) is _core(value) or (
        not isinstance(value, fx.Node) and bound[name] == value
    ):
        yield bound


def _core(value: Any) -> Any:
    return list(_through_casts(value))[-1] if isinstance(value, fx.Node) else value


def _through_casts(value: Any) -> Iterator[fx.Node]:
    """A node, and what it is a cast of."""
    while isinstance(value, fx.Node):
        yield value
        if not has(value, Trait.CAST) or not value.args:
            return
        value = value.args[0]


def _compile(expression: Expression, node: ast.expr) -> Name | Number | Applied:
    if isinstance(node, ast.Name):
        return Name(spelling(node))
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Number(float(node.value))
    if isinstance(node, ast.BinOp | ast.UnaryOp) and type(node.op) in _SIGNS:
        parts = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.operand]
        operator, arguments = OPERATORS[_SIGNS[type(node.op)]], parts
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        operator = OPERATORS[spelling(node.func)]
        arguments = _positional(expression, operator, node)
    else:
        raise _refuse(expression, f"{type(node).__name__.lower()} cannot be looked for")
    if not operator.aten:
        raise _refuse(expression, f"'{operator.name}' stands for no single operation of a graph")
    return Applied(operator, tuple(_compile(expression, part) for part in arguments))


def _positional(expression: Expression, operator: Operator, node: ast.Call) -> list[ast.expr]:
    """A call's arguments by position; keywords must follow on without a gap."""
    keywords = {str(word.arg): word.value for word in node.keywords}
    try:
        given = operator.signature.bind(*node.args, **keywords)
    except TypeError as error:
        where = expression.where(node.col_offset)
        raise SurgeryError("PSG115", str(error), f"use {operator.usage}", where) from None
    if len(given.args) != len(node.args) + len(keywords):
        raise _refuse(expression, f"give the arguments of '{operator.name}' by position")
    return list(given.args)


def _refuse(expression: Expression, message: str) -> SurgeryError:
    text = f"the pattern '{expression.text}': {message}"
    return SurgeryError("PSG144", text, where=expression.where())
