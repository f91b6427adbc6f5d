"""Initial values: what a rule's parameters are before training.

``init`` is an expression like any other (``norm(W, 1)``, ``0.1 * normal(1)``) that may also name
the initialisers of this table, each a tensor of the parameter's own shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from peftsurgery.errors import SurgeryError
from peftsurgery.language.evaluation import describe_value, evaluate
from peftsurgery.language.expression import Expression
from peftsurgery.language.operators import OPERATORS, Operator
from peftsurgery.lazily import torch

if TYPE_CHECKING:
    from torch import Tensor

Initialiser = Callable[..., "Tensor"]


def kaiming_uniform(t: Tensor, generator: torch.Generator | None, a: float = 0.0) -> Tensor:
    """Uniform in ±√(6 / ((1 + a²) fan_in)) (He et al., 2015)."""
    return torch.nn.init.kaiming_uniform_(t, a=a, generator=generator)


def xavier_uniform(t: Tensor, generator: torch.Generator | None, gain: float = 1.0) -> Tensor:
    """Uniform in ±gain √(6 / (fan_in + fan_out)) (Glorot and Bengio, 2010)."""
    return torch.nn.init.xavier_uniform_(t, gain=gain, generator=generator)


def normal(t: Tensor, generator: torch.Generator | None, std: float = 1.0) -> Tensor:
    """Normal with mean 0 and standard deviation ``std``."""
    return t.normal_(0.0, std, generator=generator)


def uniform(
    t: Tensor, generator: torch.Generator | None, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """Uniform between ``low`` and ``high``."""
    return t.uniform_(low, high, generator=generator)


def zeros(t: Tensor, generator: torch.Generator | None) -> Tensor:
    """Zeros."""
    return t.zero_()


def ones(t: Tensor, generator: torch.Generator | None) -> Tensor:
    """Ones."""
    return t.fill_(1.0)


def eye(t: Tensor, generator: torch.Generator | None) -> Tensor:
    """The identity matrix; a matrix that is not square is the identity cut or padded with zeros."""
    return torch.nn.init.eye_(t)


def rows(t: Tensor, generator: torch.Generator | None, W: Tensor, ids: Sequence[int]) -> Tensor:
    """The rows of W that ``ids`` name, from the start again when they are used up."""
    wanted = [ids[number % len(ids)] for number in range(t.shape[0])]
    return t.copy_(W[torch.tensor(wanted, device=W.device)])


def sample(t: Tensor, generator: torch.Generator | None, W: Tensor) -> Tensor:
    """Rows of W drawn at random, one as likely as another."""
    wanted = torch.randint(W.shape[0], t.shape[:-1], generator=generator, device=W.device)
    return t.copy_(W[wanted])


INITIALISERS: Mapping[str, Initialiser] = {
    function.__name__: function
    for function in (kaiming_uniform, xavier_uniform, normal, uniform, zeros, ones, eye)
}
"""What draws a tensor of a parameter's shape; bare, it is called without arguments."""

FROM_WEIGHTS: Mapping[str, Initialiser] = {
    function.__name__: function for function in (rows, sample)
}
"""What fills a parameter's shape from a weight that it is given."""


def initial(
    expression: Expression,
    shape: tuple[int, ...],
    env: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Make a parameter's initial tensor, of ``shape``, by evaluating ``expression``.

    ``env`` binds sizes, settings and the weights that the expression names; ``dtype`` is fp32 if
    none is given. Raises PSG123 if the value does not fit the shape.
    """
    dtype = torch.float32 if dtype is None else dtype

    def fresh() -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    operators = {**OPERATORS, **_as_operators(fresh, generator)}
    with torch.no_grad():
        try:
            # an initialiser may be named without parentheses; no other binding is computed
            names = expression.names
            bare = {n: INITIALISERS[n](fresh(), generator) for n in names if n in INITIALISERS}
            read = {n: env[n] for n in names if n in env}
            value = evaluate(expression, {**bare, **read}, operators)
        except (ValueError, IndexError) as error:
            raise _unfit(expression, shape, str(error)) from error
    if isinstance(value, bool | int | float):
        return fresh().fill_(value)
    if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape:
        raise _unfit(expression, shape, f"the value is {describe_value(value)}")
    # in the order of its dimensions, as it is when it was saved: products round by the order too
    start = value.detach().to(dtype=dtype, device=device)
    return start.clone(memory_format=torch.contiguous_format)


def _as_operators(
    fresh: Callable[[], Tensor], generator: torch.Generator | None
) -> dict[str, Operator]:
    """The initialisers as operators that draw a tensor of the parameter's shape."""

    def bind(draw: Initialiser) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: draw(fresh(), generator, *args, **kwargs)

    return {
        name: Operator(name, bind(draw), *_described(draw))
        for name, draw in {**INITIALISERS, **FROM_WEIGHTS}.items()
    }


@cache
def _described(draw: Initialiser) -> tuple[str, inspect.Signature]:
    """The text of an initialiser, and the arguments that an expression gives to it.

    Those are all but the tensor and the generator. Every parameter of a large model asks again.
    """
    signature = inspect.Signature(list(inspect.signature(draw).parameters.values())[2:])
    return inspect.getdoc(draw) or "", signature


def _unfit(expression: Expression, shape: tuple[int, ...], reason: str) -> SurgeryError:
    message = f"'{expression.text}' does not give a tensor of shape {list(shape)}: {reason}"
    return SurgeryError("PSG123", message, where=expression.where())
