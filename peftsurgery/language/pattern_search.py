"""Searches for patterns in graphs.

Commutative operators match in either order; a name that is repeated must be the same value each
time; an argument that the pattern leaves out (a bias) may be anything; casts that a model has in
between are looked through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from peftsurgery.anatomy.ops import Trait, has, meaning
from peftsurgery.anatomy.values import parameter_of, shape
from peftsurgery.capture.schemas import op, writes
from peftsurgery.language.expression import Expression
from peftsurgery.language.operators import Operator
from peftsurgery.language.pattern import Applied, Name, Number, compile_pattern, refusal_of

MAX_STEPS = 200_000

Bindings = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Match:
    """One occurrence: the node that computes the pattern, and what each free name is there.

    ``turned`` are the names of weights of linears that the graph holds as (in, out).
    """

    root: fx.Node
    bindings: Mapping[str, Any]
    turned: frozenset[str] = frozenset()


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
            raise refusal_of(self.expression, "it takes too many steps to search for")
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
    usual = (None, 1, False, "none")
    if writes(node.target) or any(value not in usual for value in node.kwargs.values()):
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
    else:
        is_equal = not isinstance(value, fx.Node) and bound[name] == value
        if is_equal or _core(bound[name]) is _core(value):
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
