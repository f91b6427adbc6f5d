"""What a trace asked of the number of a turn, and whether it would be told the same in every turn.

    i < n                            in every turn of n
    64 i + 64 <= 64 n                likewise
    min(i + 1, n) - i == 1           likewise
    i == 0, i % 2 == 0               not: the loop is no repetition

A turn's number i and what is left behind it, m, are any numbers from nought, with n = i + 1 + m.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import sympy
from torch.utils._sympy import functions

from peftsurgery.capture.equal_blocks.size_questions import Questions

_PROVED = "_maybe_evaluate_static"
"""The question that is answered by what is known alone."""


def hold_in_every_turn(
    questions: Questions, numbers: Collection[sympy.Symbol], count: sympy.Expr
) -> bool:
    """Whether all answers hold for every turn, and so for every value of the symbols ``numbers``.

    ``count`` is how many turns there are. What the trace assumed of a turn's number it forgets,
    but for what that comes to for sizes.
    """
    symbols = set(numbers)
    of_sizes = []
    for claim in _claims(questions, symbols):
        left = _of_sizes(claim, symbols, count)
        if left is sympy.false:
            return False
        of_sizes.append(left)
    shapes = questions.shapes
    shapes.guards[:] = [g for g in shapes.guards if not g.expr.free_symbols & symbols]
    for deferred in shapes.deferred_runtime_asserts.values():
        deferred[:] = [claim for claim in deferred if not claim.expr.free_symbols & symbols]
    return all(bool(shapes.evaluate_expr(left)) for left in dict.fromkeys(of_sizes))


def _claims(questions: Questions, symbols: set[sympy.Symbol]) -> Iterator[Any]:
    """What the trace assumes of these symbols by the answers that it was given."""
    for (name, asked, *_), answer in questions.asked.items():
        if name == _PROVED or not isinstance(asked, sympy.Basic):
            continue
        if not asked.free_symbols & symbols:
            continue
        if isinstance(answer, bool | sympy.logic.boolalg.BooleanAtom):
            yield asked if bool(answer) else sympy.Not(asked)
        else:
            yield sympy.Eq(asked, answer)


def _of_sizes(claim: Any, symbols: set[sympy.Symbol], count: sympy.Expr) -> Any:
    """What a relation comes to if it is to hold in every turn: true, false, or one of sizes."""
    if isinstance(claim, sympy.And):
        return sympy.And(*(_of_sizes(part, symbols, count) for part in claim.args))
    found = claim.free_symbols & symbols
    if not isinstance(claim, sympy.core.relational.Relational) or len(found) > 1:
        return sympy.false
    turn, left = (sympy.Dummy(name, integer=True, nonnegative=True) for name in "im")
    sizes = {
        size: sympy.Dummy(str(size), integer=True, nonnegative=True)
        for size in (claim.free_symbols | count.free_symbols) - symbols
    }

    def told(side: Any) -> Any:
        side = side.xreplace(dict.fromkeys(found, turn)).xreplace({count: turn + 1 + left})
        side = side.replace(functions.Max, sympy.Max).replace(functions.Min, sympy.Min)
        return sympy.expand(side.xreplace(sizes))

    one, other = told(claim.lhs), told(claim.rhs)
    if not (one - other).free_symbols & {turn, left}:
        back = {dummy: size for size, dummy in sizes.items()}
        return claim.func(one, other).xreplace(back)
    return sympy.true if _IS[claim.func](sympy.expand(one - other)) else sympy.false


_IS: Any = {
    sympy.Eq: lambda more: more.is_zero,
    sympy.Ne: lambda more: more.is_nonzero,
    sympy.Ge: lambda more: more.is_nonnegative,
    sympy.Gt: lambda more: more.is_positive,
    sympy.Le: lambda more: more.is_nonpositive,
    sympy.Lt: lambda more: more.is_negative,
}
