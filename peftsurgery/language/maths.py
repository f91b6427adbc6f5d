"""The symbolic reading: an expression printed as maths.

``y + (alpha / rank) * linear(linear(x, A), B)`` reads ``y + (α / rank)·B·A·x``. The evaluator is
the same as for tensors; only the values are symbols that remember how tightly their text binds.
"""

from __future__ import annotations

import operator as python
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from html.entities import html5
from types import MappingProxyType
from typing import Any

from peftsurgery.language.evaluation import Context, evaluate
from peftsurgery.language.expression import Expression
from peftsurgery.language.operators import OPERATORS, Operator

SUM, QUOTIENT, PRODUCT, POWER, ATOM = range(5)

_LETTERS = ("alpha", "beta", "gamma", "delta", "epsilon", "theta", "mu", "sigma", "tau", "phi")
_GREEK = {name: html5[f"{name};"] for name in _LETTERS} | {"lambda_": html5["lambda;"]}


def _joining(sign: str, level: int, needed: int) -> Callable[[Symbol, Any], Symbol]:
    """The operator that is written as a sign between its operands."""
    return lambda self, other: _join(self, sign, other, level, needed)


def _comparing(sign: Callable[[Any, Any], Any]) -> Callable[[Symbol, Any], bool]:
    """The comparison of the numbers that two symbols are known to be."""
    return lambda self, other: bool(sign(self.value, _value(other)))


def _reflected(method: Callable[[Symbol, Any], Symbol]) -> Callable[[Symbol, Any], Symbol]:
    """The same operator where the number or tuple on its left is no symbol."""
    return lambda self, other: method(symbol(other), self)


@dataclass(frozen=True, eq=False)
class Symbol:
    """Printed expression with its binding strength, and its ``value`` if it is a known number."""

    text: str
    level: int = ATOM
    scalar: bool = False
    value: Any = None

    def at(self, level: int) -> str:
        """The text as an operand that must bind at ``level`` or tighter."""
        return self.text if self.level >= level else f"({self.text})"

    __add__, __sub__ = _joining(" + ", SUM, SUM), _joining(" − ", SUM, QUOTIENT)
    __truediv__, __mod__ = (_joining(sign, QUOTIENT, POWER) for sign in (" / ", " mod "))
    __matmul__ = _joining("·", PRODUCT, PRODUCT)

    def __mul__(self, other: Any) -> Symbol:
        other = symbol(other)
        if self.scalar or other.scalar:
            return _join(self, "·", other, PRODUCT, PRODUCT)
        return _join(self, " ⊙ ", other, QUOTIENT, PRODUCT)

    def __floordiv__(self, other: Any) -> Symbol:
        inner = _join(self, " / ", other, QUOTIENT, POWER)
        return Symbol(f"⌊{inner.text}⌋", ATOM, inner.scalar)

    def __pow__(self, other: Any) -> Symbol:
        return Symbol(f"{self.at(ATOM)}^{symbol(other).at(ATOM)}", POWER, self.scalar)

    __radd__, __rsub__, __rmul__ = map(_reflected, (__add__, __sub__, __mul__))
    __rtruediv__, __rfloordiv__ = map(_reflected, (__truediv__, __floordiv__))
    __rmod__, __rpow__ = map(_reflected, (__mod__, __pow__))

    def __neg__(self) -> Symbol:
        value = self.value if isinstance(self.value, int | float) else None
        return Symbol(f"−{self.at(PRODUCT)}", SUM, self.scalar, None if value is None else -value)

    def __pos__(self) -> Symbol:
        return self

    def __getitem__(self, index: Any) -> Symbol:
        parts = index if isinstance(index, tuple) else (index,)
        return Symbol(f"{self.at(ATOM)}[{', '.join(map(_index, parts))}]", ATOM, self.scalar)

    __lt__, __le__, __gt__, __ge__ = map(_comparing, (python.lt, python.le, python.gt, python.ge))

    def __str__(self) -> str:
        return self.text


def maths(
    expression: Expression,
    settings: Mapping[str, Any] | None = None,
    scalars: Iterable[str] = (),
    functions: Mapping[str, Operator] = MappingProxyType({}),
) -> str:
    """The expression as maths.

    ``settings`` decide any ``if``; they and the names in ``scalars`` are numbers, everything else
    is a tensor. ``functions`` may be called beside the operators.
    """
    known = settings or {}
    numbers = {*known, *scalars}
    env = {
        name: Symbol(_GREEK.get(name, name), ATOM, name in numbers, known.get(name))
        for name in expression.names
    }
    operators = {**OPERATORS, **functions}
    context = Context(call=print_call, decide=_value)
    return str(symbol(evaluate(expression, env, operators, context)))


def print_call(operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Symbol:
    """A call as its operator's entry writes it, or as ``name(arguments)``."""
    kwargs = {name: value for name, value in kwargs.items() if name != "training"}
    given = [a for a in args if not _absent(a)]
    form = _form(operator, len(given))
    scalar = all(symbol(a).scalar for a in (*args, *kwargs.values()))
    if form is None:
        shown = [symbol(a).text for a in args]
        shown += [f"{name}={symbol(value).text}" for name, value in kwargs.items()]
        text = f"{operator.name}({', '.join(shown)})"
        return Symbol(text, ATOM, scalar, _number(operator, args) if scalar else None)
    if form == "{0}":  # what changes no number, such as detach
        return symbol(given[0])
    level, needed = _levels(form)
    return Symbol(form.format(*(symbol(a).at(needed) for a in given)), level, scalar)


def _number(operator: Operator, args: tuple[Any, ...]) -> Any:
    """Value of an operator on known numbers; None if an argument is unknown."""
    values = [symbol(a).value for a in args]
    return None if any(value is None for value in values) else operator.function(*values)


def symbol(value: Any) -> Symbol:
    """A symbol as it is; anything else as the number or tuple that it is."""
    if isinstance(value, Symbol):
        return value
    if isinstance(value, tuple):
        return Symbol(f"({', '.join(symbol(item).text for item in value)})", ATOM, True)
    whole = isinstance(value, float) and value.is_integer()
    text = str(int(value)) if whole else str(value)
    return Symbol(text.replace("-", "−"), ATOM if text[0] != "-" else SUM, True, value)


def _form(operator: Operator, count: int) -> str | None:
    """The form for so many arguments: the last that does not ask for more."""
    fitting = [form for form in operator.maths if f"{{{count}}}" not in form]
    return fitting[-1] if fitting else None


def _levels(form: str) -> tuple[int, int]:
    """How tightly a form binds, and how tightly its arguments must."""
    if " + " in form or " − " in form:
        return SUM, PRODUCT
    if "·" in form or "∗" in form:
        return PRODUCT, PRODUCT
    if " / " in form or " ⊙ " in form:
        return QUOTIENT, POWER
    bracketed = form.endswith((")", "‖", "|", "⌋"))
    return (ATOM, SUM) if bracketed else (POWER, ATOM)


def _absent(value: Any) -> bool:
    """Whether an argument is an absent bias (0 or None)."""
    return value is None or (isinstance(value, int | float) and value == 0)


def _join(left: Symbol, sign: str, right: Any, level: int, needed: int) -> Symbol:
    right = symbol(right)
    text = f"{left.at(level)}{sign}{right.at(needed)}"
    return Symbol(text, level, left.scalar and right.scalar)


def _value(other: Any) -> Any:
    return other.value if isinstance(other, Symbol) else other


def _index(part: Any) -> str:
    if isinstance(part, slice):
        ends = ["" if end is None else str(end) for end in (part.start, part.stop, part.step)]
        return ":".join(ends[: 3 if ends[2] else 2])
    return "..." if part is Ellipsis else str(part)
