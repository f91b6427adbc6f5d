"""Whether a rule folds each row of a weight by itself: tried on small random arrays, without torch.

Where it does, a weight of any size is folded a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np

from peftsurgery.checkpoint.arrays import Array
from peftsurgery.checkpoint.numpy_operators import NUMPY
from peftsurgery.errors import SurgeryError
from peftsurgery.language.environment import Environment, with_lets
from peftsurgery.language.evaluation import PLAIN, evaluate
from peftsurgery.language.expression import Expression
from peftsurgery.language.parameter_axes import sized_axes
from peftsurgery.language.schema import Rule

# The sizes of the weights of a kind of site, in the order of their axes.
SHAPES: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "linear": {"W": ("out", "in"), "b": ("out",)},
        "embedding": {"W": ("in", "out")},
    }
)
TRIED = MappingProxyType({"in": 10, "out": 6})


def row_axes(rule: Rule, numbers: Mapping[str, Any]) -> dict[str, int] | None:
    """The axes of parameters that go with the rows of the weights; None if rows are mixed.

    ``numbers`` are the settings and sizes that the rule's expressions read. Also None for a kind of
    site whose weights are not matrices.
    """
    shapes = SHAPES.get(rule.kind.name)
    if shapes is None:
        return None
    known, rows, draw = {**numbers, **TRIED}, shapes["W"][0], np.random.default_rng(0)
    values = {
        name: draw.standard_normal(parameter_shape(rule, name, known)) for name in rule.params
    }
    values |= {
        name: draw.standard_normal([TRIED[s] for s in sizes]) for name, sizes in shapes.items()
    }
    axes = sized_axes(rule, rows)
    ends = (0, TRIED[rows] // 3, TRIED[rows])

    def part(start: int, end: int) -> Callable[[str], Array]:
        def made(name: str) -> Array:
            axis = 0 if name in shapes else axes.get(name)
            value = values[name]
            return value if axis is None else value.take(range(start, end), axis)

        return made

    try:
        whole = folded(rule.fold, rule.let, known, dict.fromkeys(values, part(0, TRIED[rows])))
        parts = [
            folded(rule.fold, rule.let, known, dict.fromkeys(values, part(*each)))
            for each in pairwise(ends)
        ]
        joined = {name: np.concatenate([each[name] for each in parts]) for name in whole}
    except (SurgeryError, ValueError):
        return None
    is_same = all(np.allclose(joined[n], whole[n], 1e-9, 1e-9) for n in whole)
    return axes if is_same else None


def parameter_shape(rule: Rule, name: str, numbers: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of a rule's parameter, by settings and sizes."""
    known = with_lets(Environment(numbers), rule.let, PLAIN, NUMPY)
    return tuple(int(evaluate(size, known, NUMPY)) for size in rule.params[name].shape)


def folded(
    fold: Mapping[str, Expression],
    let: Mapping[str, Expression],
    numbers: Mapping[str, Any],
    made: Mapping[str, Callable[[str], Any]],
) -> dict[str, Any]:
    """The values of a rule's folds by weight; ``made`` gives weights and parameters as arrays."""
    bound = Environment(numbers, made)
    names = with_lets(bound, let, PLAIN, NUMPY)
    results = {name: evaluate(expression, names, NUMPY) for name, expression in fold.items()}
    for environment in (bound, names):
        environment.release()
    return results
