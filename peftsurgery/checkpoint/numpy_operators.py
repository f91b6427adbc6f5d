"""The operators of folds over numpy arrays: a rule's text read without torch.

A fold is evaluated by the evaluator that reads it over graphs and tensors; over arrays, the name of
an operator means a line of numpy. What a rule's author registered is torch code, and runs as that.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from peftsurgery.checkpoint.arrays import Array
from peftsurgery.language.operators import OPERATORS, Operator

# Those whose own code is for numbers and arrays too.
_AS_THEY_ARE = {"max", "floor", "abs", "size", "count", "divisor", "small_factor"}


def _of_both(array: Callable[[Array], Array], number: Callable[[float], float]) -> Any:
    return lambda x: array(x) if isinstance(x, np.ndarray) else number(x)


def _over_axes(function: Callable[..., Any]) -> Any:
    return lambda x, dim, keepdim=False: np.asarray(function(x, axis=dim, keepdims=keepdim))


def _skew(v: Array, n: int) -> Array:
    upper = np.zeros((*v.shape[:-1], n, n), v.dtype)
    upper[..., *np.triu_indices(n, 1)] = v
    return upper - np.swapaxes(upper, -1, -2)


def _put_rows(W: Array, rows: Sequence[int], values: Array) -> Array:
    changed = W.copy()
    changed[list(rows)] = values
    return changed


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "matmul": lambda a, b: np.asarray(np.matmul(a, b)),
    "sqrt": _of_both(np.sqrt, math.sqrt),
    "exp": _of_both(np.exp, math.exp),
    "log": _of_both(np.log, math.log),
    "sigmoid": lambda x: np.reciprocal(1 + np.exp(-x)),
    "tanh": lambda x: np.asarray(np.tanh(x)),
    "mean": _over_axes(np.mean),
    "sum": _over_axes(np.sum),
    "norm": _over_axes(np.linalg.norm),
    "detach": lambda x: x,
    "transpose": lambda x, first=-2, second=-1: np.swapaxes(x, first, second),
    "reshape": lambda x, shape: np.reshape(x, tuple(shape)),
    "view_as": lambda x, other: np.reshape(x, other.shape),
    "concat": lambda a, b, dim=-1: np.concatenate((a, b), dim),
    "zeros_like": np.zeros_like,
    "ones_like": np.ones_like,
    "eye_like": lambda x: np.broadcast_to(np.eye(x.shape[-1], dtype=x.dtype), x.shape),
    "skew": _skew,
    "take_rows": lambda W, rows: W[list(rows)],
    "put_rows": _put_rows,
}


class _NumpyOperators(Mapping[str, Operator]):
    """Operators by name: numpy's for those above, torch's through tensors for all others."""

    def __getitem__(self, name: str) -> Operator:
        operator = OPERATORS[name]
        if name in _AS_THEY_ARE:
            return operator
        return replace(operator, function=_FUNCTIONS.get(name) or _over_tensors(operator.function))

    def __iter__(self) -> Iterator[str]:
        return iter(OPERATORS)

    def __len__(self) -> int:
        return len(OPERATORS)


NUMPY: Mapping[str, Operator] = _NumpyOperators()
"""Every operator by name, over numpy arrays."""


def _over_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Torch code, between arrays."""

    def call(*args: Any, **kwargs: Any) -> Any:
        torch = importlib.import_module("torch")

        def tensor(value: Any) -> Any:
            is_array = isinstance(value, np.ndarray)
            return torch.from_numpy(np.ascontiguousarray(value)) if is_array else value

        given = {name: tensor(value) for name, value in kwargs.items()}
        result = function(*(tensor(each) for each in args), **given)
        return result.numpy() if isinstance(result, torch.Tensor) else result

    return call
