"""The operators of folds over numpy arrays: a rule's text read without torch.

A fold is evaluated by the evaluator that reads it over graphs and tensors; over arrays, the name of
an operator means a line of numpy. What a rule's author registered is torch code, and runs as that.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from peftsurgery.checkpoint.arrays import Array
from peftsurgery.language.operators import OPERATORS, Operator

Dimensions = int | tuple[int, ...]


def larger(a: float, b: float) -> float:
    """The larger of two numbers."""
    return max(a, b)


def floor(a: float) -> int:
    """The largest whole number that is not above a."""
    return math.floor(a)


def matmul(a: Array, b: Array) -> Array:
    """The matrix product of the last two dimensions, written a @ b outside patterns."""
    return np.asarray(np.matmul(a, b))


def sqrt(x: Any) -> Any:
    """The square root, of an array or a number."""
    return np.sqrt(x) if isinstance(x, np.ndarray) else math.sqrt(x)


def exp(x: Any) -> Any:
    """e^x, of an array or a number."""
    return np.exp(x) if isinstance(x, np.ndarray) else math.exp(x)


def log(x: Any) -> Any:
    """The natural logarithm, of an array or a number."""
    return np.log(x) if isinstance(x, np.ndarray) else math.log(x)


def absolute(x: Any) -> Any:
    """The absolute value, of an array or a number."""
    return abs(x)


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x)."""
    result: Array = np.reciprocal(1 + np.exp(-x))
    return result


def tanh(x: Array) -> Array:
    """The hyperbolic tangent."""
    return np.asarray(np.tanh(x))


def mean(x: Array, dim: Dimensions, keepdim: bool = False) -> Array:
    """The mean over ``dim``, one dimension or several."""
    return np.asarray(np.mean(x, axis=dim, keepdims=keepdim))


def total(x: Array, dim: Dimensions, keepdim: bool = False) -> Array:
    """The sum over ``dim``, one dimension or several."""
    return np.asarray(np.sum(x, axis=dim, keepdims=keepdim))


def norm(x: Array, dim: Dimensions, keepdim: bool = False) -> Array:
    """The Euclidean norm over ``dim``; over two dimensions, the Frobenius norm of a matrix."""
    return np.asarray(np.linalg.norm(x, axis=dim, keepdims=keepdim))


def detach(x: Array) -> Array:
    """The same value."""
    return x


def transpose(x: Array, first: int = -2, second: int = -1) -> Array:
    """Two dimensions exchanged; the last two unless told otherwise."""
    return np.swapaxes(x, first, second)


def reshape(x: Array, shape: Sequence[int]) -> Array:
    """The same elements in another shape; one size may be -1."""
    return np.reshape(x, tuple(shape))


def view_as(x: Array, other: Array) -> Array:
    """The elements of x in the shape of ``other``."""
    return np.reshape(x, other.shape)


def concat(a: Array, b: Array, dim: int = -1) -> Array:
    """Two arrays one after the other along ``dim``."""
    return np.concatenate((a, b), dim)


def zeros_like(x: Array) -> Array:
    """Zeros of the shape and dtype of x."""
    return np.zeros_like(x)


def ones_like(x: Array) -> Array:
    """Ones of the shape and dtype of x."""
    return np.ones_like(x)


def eye_like(x: Array) -> Array:
    """The identity matrix of the size and dtype of x, which is square."""
    return np.broadcast_to(np.eye(x.shape[-1], dtype=x.dtype), x.shape)


def skew(v: Array, n: int) -> Array:
    """The (n, n) matrix with S = -Sᵀ whose entries above the diagonal, row by row, are v."""
    upper = np.zeros((*v.shape[:-1], n, n), v.dtype)
    upper[..., *np.triu_indices(n, 1)] = v
    return upper - np.swapaxes(upper, -1, -2)


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "max": larger,
    "floor": floor,
    "matmul": matmul,
    "sqrt": sqrt,
    "exp": exp,
    "log": log,
    "abs": absolute,
    "sigmoid": sigmoid,
    "tanh": tanh,
    "mean": mean,
    "sum": total,
    "norm": norm,
    "detach": detach,
    "transpose": transpose,
    "reshape": reshape,
    "view_as": view_as,
    "concat": concat,
    "zeros_like": zeros_like,
    "ones_like": ones_like,
    "eye_like": eye_like,
    "skew": skew,
}


class _NumpyOperators(Mapping[str, Operator]):
    """Operators by name: numpy's for those above, torch's through tensors for all others."""

    def __getitem__(self, name: str) -> Operator:
        function = _FUNCTIONS.get(name)
        if function is None:
            return _over_tensors(OPERATORS[name])
        return Operator(name, function, function.__doc__ or "", inspect.signature(function))

    def __contains__(self, name: object) -> bool:
        return name in _FUNCTIONS or name in OPERATORS

    def __iter__(self) -> Iterator[str]:
        return iter(OPERATORS)

    def __len__(self) -> int:
        return len(OPERATORS)


NUMPY: Mapping[str, Operator] = _NumpyOperators()
"""Every operator by name, over numpy arrays."""


def _over_tensors(operator: Operator) -> Operator:
    """An operator of torch code, between arrays."""

    def call(*args: Any, **kwargs: Any) -> Any:
        torch = importlib.import_module("torch")

        def tensor(value: Any) -> Any:
            is_array = isinstance(value, np.ndarray)
            return torch.from_numpy(np.ascontiguousarray(value)) if is_array else value

        given = {name: tensor(value) for name, value in kwargs.items()}
        result = operator.function(*(tensor(each) for each in args), **given)
        return result.numpy() if isinstance(result, torch.Tensor) else result

    return replace(operator, function=call)
