"""Patterns: an expression with free names, to be looked for in a graph of ATen operations.

``mul(silu(linear(x, gate)), linear(x, up))`` finds every gated feed-forward, whatever computes it.
Each operator stands for the ATen operations of its entry in the table.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from peftsurgery.errors import SurgeryError
from peftsurgery.language.expression import Expression, check_calls, spelling
from peftsurgery.language.operators import OPERATORS, Operator

_SIGNS: Mapping[type[ast.AST], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.MatMult: "matmul",
    ast.Pow: "pow",
    ast.USub: "neg",
}


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


def compile_pattern(expression: Expression) -> Applied:
    """Compile an expression into a pattern. Raises PSG114, PSG115 or PSG144 if it is none."""
    check_calls(expression, OPERATORS)
    pattern = _compile(expression, expression.tree)
    if not isinstance(pattern, Applied):
        raise refusal_of(expression, "it must be an operator at its root")
    if "y" in expression.names:
        raise refusal_of(expression, "'y' is the value of the whole pattern; use another name")
    return pattern


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
        raise refusal_of(expression, f"{type(node).__name__.lower()} cannot be looked for")
    if not operator.aten:
        raise refusal_of(expression, f"'{operator.name}' stands for no single operation of a graph")
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
        raise refusal_of(expression, f"give the arguments of '{operator.name}' by position")
    return list(given.args)


def refusal_of(expression: Expression, message: str) -> SurgeryError:
    """The refusal of a pattern. PSG144."""
    text = f"the pattern '{expression.text}': {message}"
    return SurgeryError("PSG144", text, where=expression.where())
