"""Whether a rule folds each row of a weight by itself, or each column: tried on random arrays.

Where it does, a weight of any size is folded a few lines at a time. All this is done without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
from peftsurgery.language.said import SaidRule

# The sizes of the weights of a kind of site, in the order of their axes.
SHAPES: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "linear": {"W": ("out", "in"), "b": ("out",)},
        "embedding": {"W": ("in", "out")},
        "experts": {"W": ("experts", "out", "in"), "b": ("experts", "out")},
        "conv": {"W": ("out", "in", "kernel"), "b": ("out",)},
    }
)
# More of them for rules that are for sizes that a number divides.
TRIED = (
    {"in": 10, "out": 6, "experts": 4},
    {"in": 48, "out": 64, "experts": 4},
    {"in": 256, "out": 240, "experts": 4},
)


def row_axes(rule: SaidRule, numbers: Mapping[str, Any]) -> dict[str, int] | None:
    """The axes of parameters that go with the rows of the weights; None if rows are mixed.

    Rows are the entries of a weight's first axis; ``numbers`` are the settings and a real site's
    sizes. None too for kinds of sites whose weights are none of ``SHAPES``.
    """
    return _axes(rule, row_size(rule), numbers)


def line_axes(rule: SaidRule, numbers: Mapping[str, Any], is_turned: bool) -> dict[str, int] | None:
    """The axes of parameters that go with the lines of matrices, or of those in a stack.

    Lines are what is stored one after the other: the rows of a matrix, or its columns if it
    ``is_turned``. None if these are mixed, if a weight that is folded has none, and for kernels.
    """
    shapes = SHAPES.get(rule.kind.name, {"W": ("kernel",)})
    size = shapes["W"][-1 if is_turned else -2 :][0]
    have_it = all(size in shapes.get(name, ()) for name in rule.fold)
    return _axes(rule, size, numbers) if have_it and "kernel" not in shapes["W"] else None


def has_lines(rule: SaidRule, is_turned: bool) -> bool:
    """Whether a rule's weights have lines that are not their rows: turned ones, and stacks."""
    return is_turned or row_size(rule) == "experts"


def row_size(rule: SaidRule) -> str | None:
    """The size that counts the rows of a rule's weights."""
    shapes = SHAPES.get(rule.kind.name)
    return None if shapes is None else shapes["W"][0]


def _axes(rule: SaidRule, size: str | None, numbers: Mapping[str, Any]) -> dict[str, int] | None:
    """The axes of parameters that go with a size of the weights, if these can be cut along it."""
    for tried in TRIED if size is not None else ():
        try:
            can_be_cut = _can_be_cut(rule, str(size), {**numbers, **tried})
        except (SurgeryError, ValueError, TypeError, RuntimeError):
            continue
        return sized_axes(rule, str(size)) if can_be_cut else None
    return None


def _can_be_cut(rule: SaidRule, size: str, known: Mapping[str, Any]) -> bool:
    """Whether weights are folded in two parts, along their axis of this size, as they are whole."""
    shapes = SHAPES[rule.kind.name]
    axes: dict[str, int] = sized_axes(rule, size)
    axes |= {name: own.index(size) for name, own in shapes.items() if size in own}
    sizes = {name: parameter_shape(rule, name, known) for name in rule.params}
    sizes |= {name: _shape(own, known) for name, own in shapes.items()}
    values = {name: _mixed(shape, seed) for seed, (name, shape) in enumerate(sizes.items())}
    count = values["W"].shape[axes["W"]]
    if not values["W"].size:  # of more groups than inputs
        raise ValueError("nothing to try")

    def part(start: int, end: int) -> Callable[[str], Array]:
        def made(name: str) -> Array:
            axis, value = axes.get(name), values[name]
            return value if axis is None else value.take(range(start, end), axis)

        return made

    whole, *parts = (
        folded(rule.fold, rule.let, known, dict.fromkeys(values, part(*each)))
        for each in ((0, count), (0, count // 3), (count // 3, count))
    )
    joined = {name: np.concatenate([each[name] for each in parts], axes[name]) for name in whole}
    return all(np.allclose(joined[name], value, 1e-9, 1e-9) for name, value in whole.items())


def _mixed(shape: tuple[int, ...], seed: int) -> Array:
    """Numbers between -1 and 1 without any order, others for each seed.

    numpy.random would do, but takes longer to import than the rest of this takes.
    """
    places = np.arange(1, math.prod(shape) + 1, dtype=np.float64)
    return np.modf(np.sin(places + 1e3 * seed) * 43758.5453)[0].reshape(shape)


def _shape(sizes: tuple[str, ...], known: Mapping[str, Any]) -> tuple[int, ...]:
    """A weight's shape; a kernel's is (out, in // groups, *kernel)."""
    if "kernel" not in sizes:
        return tuple(known[size] for size in sizes)
    return (known["out"], known["in"] // known["groups"], *known["kernel"])


def parameter_shape(rule: SaidRule, name: str, numbers: Mapping[str, Any]) -> tuple[int, ...]:
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
