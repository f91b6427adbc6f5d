"""One evaluator, several readings.

:func:`evaluate` walks an expression's tree and applies Python's arithmetic and the operators of the
table to whatever its names are bound to. Over ``fx.Proxy`` it inserts nodes, over fake tensors it
infers shapes, over tensors and numbers it computes, over symbols (:mod:`.maths`) it prints.
"""

from __future__ import annotations

import ast
import math
import operator as python
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

from peftsurgery.errors import SurgeryError, did_you_mean, first_line
from peftsurgery.language.expression import (
    ARITHMETIC,
    MAX_EXPONENT,
    Expression,
    check_names,
    spelling,
)
from peftsurgery.language.operators import OPERATORS, Operator
from peftsurgery.quiet import unlogged

MAX_INTEGER = 2**63


def call_function(operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The ordinary way to call an operator: run its torch code."""
    return operator.function(*args, **kwargs)


def as_it_is(value: Any) -> Any:
    """Return the value of a condition unchanged: the ordinary reading."""
    return value


@dataclass(frozen=True)
class Context:
    """Settings of one reading of an expression, besides its bindings.

    ``training`` is what stochastic operators read: a bool, or the proxy of a graph's value.
    ``call`` applies an operator; the symbolic reading prints instead of computing. ``functions``
    are what the rule's site lets it call, where they differ from their plain definitions.
    ``decide`` gives the number that a condition or an index is.
    """

    training: Any = False
    call: Callable[[Operator, tuple[Any, ...], dict[str, Any]], Any] = call_function
    functions: Mapping[str, Operator] = field(default_factory=dict)
    decide: Callable[[Any], Any] = as_it_is


PLAIN = Context()

# What torch raises of values that do not go together; of symbolic sizes it asserts that they do. A
# number where a tensor belongs lacks a tensor's attributes.
_UNFIT = (
    *(ArithmeticError, AssertionError, AttributeError, IndexError),
    *(RuntimeError, TypeError, ValueError),
)


def evaluate(
    expression: Expression,
    env: Mapping[str, Any],
    operators: Mapping[str, Operator] = OPERATORS,
    context: Context = PLAIN,
) -> Any:
    """Evaluate ``expression`` with its names bound as in ``env``.

    Raises SurgeryError: PSG113 for an unbound name, PSG114 for an unknown operator, PSG115 for
    wrong arguments, PSG116 where the values cannot be combined (shapes are printed), PSG112 where
    a number grows beyond 2^63.
    """
    check_names(expression, env)
    # torch logs a traceback of what does not fit on fake tensors; folds of files run without it,
    # and a name or a number by itself computes nothing
    is_computed = not isinstance(expression.tree, (ast.Name, ast.Constant))
    with unlogged() if is_computed and "torch" in sys.modules else nullcontext():
        return _Reading(expression, env, operators, context).value(expression.tree)


def names_read(expression: Expression, env: Mapping[str, Any]) -> frozenset[str]:
    """Names that evaluating ``expression`` reads.

    Of a choice that the numbers of ``env`` decide, those of the branch that is taken.
    """
    return frozenset(_Reading(expression, env, OPERATORS, PLAIN).read(expression.tree))


@dataclass(frozen=True)
class _Reading:
    expression: Expression
    env: Mapping[str, Any]
    operators: Mapping[str, Operator]
    context: Context

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                return self.env[spelling(node)]
            case ast.Tuple() | ast.List():
                return tuple(self.value(item) for item in node.elts)
            case ast.UnaryOp():
                return self.apply(node, ARITHMETIC[type(node.op)], self.value(node.operand))
            case ast.BinOp():
                return self.binary(node)
            case ast.Compare():
                left, right = self.value(node.left), self.value(node.comparators[0])
                return self.apply(node, ARITHMETIC[type(node.ops[0])], left, right)
            case ast.IfExp():
                return self.value(node.body if self.decided(node.test) else node.orelse)
            case ast.Subscript():
                index = self.index(node.slice)
                return self.apply(node, python.getitem, self.value(node.value), index)
            case ast.Call():
                return self.call(node)
        raise self.refuse("PSG111", node, f"{type(node).__name__} has no value")

    def read(self, node: ast.AST) -> Iterator[str]:
        """The names that the value of a node needs."""
        if isinstance(node, ast.Name):
            yield spelling(node)
        parts = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Call):
            parts = [*node.args, *node.keywords]
        elif isinstance(node, ast.IfExp) and set(self.read(node.test)) <= self.env.keys():
            parts = [node.body if self.decided(node.test) else node.orelse]
        for part in parts:
            yield from self.read(part)

    def binary(self, node: ast.BinOp) -> Any:
        left, right = self.value(node.left), self.value(node.right)
        if isinstance(node.op, ast.Pow) and isinstance(right, int | float):
            if abs(right) > MAX_EXPONENT:
                raise self.refuse("PSG112", node, f"an exponent of {right}")
            if isinstance(left, int) and left.bit_length() * abs(right) > 512:
                raise self.refuse("PSG112", node, f"{left} to the power {right}")
        return self.apply(node, ARITHMETIC[type(node.op)], left, right)

    def decided(self, node: ast.expr) -> bool:
        # the choice is made once, when the rule is read: a graph has no branch to take later
        value = self.context.decide(self.value(node))
        if isinstance(value, bool | int | float):
            return bool(value)
        raise self.refuse("PSG116", node, "a condition must be a number, known before the model")

    def index(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Tuple):
            return tuple(self.index(item) for item in node.elts)
        if isinstance(node, ast.Slice):
            parts = (node.lower, node.upper, node.step)
            return slice(*(None if p is None else self.index(p) for p in parts))
        value = self.value(node)
        if value is None or value is Ellipsis or _is_whole(self.context.decide(value)):
            return value
        raise self.refuse("PSG116", node, "an index is a whole number, a slice or None")

    def call(self, node: ast.Call) -> Any:
        if not isinstance(node.func, ast.Name):
            raise self.refuse("PSG111", node, "only operators are called, by bare name")
        name = spelling(node.func)
        if name not in self.operators:
            hint = did_you_mean(name, self.operators)
            raise self.refuse("PSG114", node, f"unknown operator '{name}'", hint)
        operator = self.operators[name]
        args = tuple(self.value(argument) for argument in node.args)
        kwargs = {str(k.arg): self.value(k.value) for k in node.keywords}
        if operator.needs_training and "training" not in kwargs:
            kwargs["training"] = self.context.training
        try:
            operator.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise self.refuse("PSG115", node, str(error), f"use {operator.usage}") from None
        return self.apply(node, lambda *_: self.context.call(operator, args, kwargs), *args)

    def apply(self, node: ast.expr, function: Callable[..., Any], *values: Any) -> Any:
        try:
            result = function(*values)
        except _UNFIT as error:
            given = ", ".join(shown for value in values if (shown := describe_value(value)))
            reason = f"{first_line(error)} (given {given})"
            if isinstance(error, ZeroDivisionError) and isinstance(node, ast.BinOp):
                reason = f"{written(node.right)} is 0, by which nothing can be divided"
            raise self.refuse("PSG116", node, reason) from error
        if isinstance(result, int) and abs(result) >= MAX_INTEGER:
            raise self.refuse("PSG112", node, "a number of 2^63 or more")
        if isinstance(result, complex) or (isinstance(result, float) and not math.isfinite(result)):
            raise self.refuse("PSG116", node, f"the result is {result}")
        return result

    def refuse(
        self, code: str, node: ast.AST, message: str, hint: str | None = None
    ) -> SurgeryError:
        text = self.expression.text
        part = f"{message}, in '{text}'"
        return SurgeryError(code, part, hint, self.expression.where(getattr(node, "col_offset", 0)))


def _is_whole(value: Any) -> bool:
    """Whether a value is a whole number: Python's, or a symbolic one of torch's."""
    return isinstance(value, SupportsIndex) and not hasattr(value, "shape")


def written(node: ast.expr) -> str:
    """A part of an expression in its own words."""
    names = {name.id: spelling(name) for name in ast.walk(node) if isinstance(name, ast.Name)}
    text = ast.unparse(node)
    for stand_in, name in names.items():
        text = text.replace(stand_in, name)
    return text


def describe_value(value: Any) -> str:
    """A value as an error shows it: a tensor by its shape, a number as it is."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return "[" + ", ".join(str(size) for size in shape) + "]"
    return str(value)[:60]
