"""The readings of a rule: its rewrite, its fold, its penalty, its shapes, its initial values.

All of them evaluate the rule's expressions over an environment (:mod:`.environment`):
what the match binds, its sizes and the settings, and the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from peftsurgery.errors import SurgeryError
from peftsurgery.language.environment import Environment, mapped, with_lets
from peftsurgery.language.evaluation import PLAIN, Context, describe_value, evaluate, names_read
from peftsurgery.language.expression import Expression, within
from peftsurgery.language.initial import initial
from peftsurgery.language.operators import OPERATORS
from peftsurgery.language.said import SaidRule
from peftsurgery.lazily import torch
from peftsurgery.reach import reach

if TYPE_CHECKING:
    from torch import Tensor

    from peftsurgery.language.schema import Param, Rule

MAX_ELEMENTS = 2**33


def rewrite(rule: Rule, env: Mapping[str, Any], context: Context = PLAIN) -> dict[str, Any]:
    """Evaluate the rule's rewrite: the new value of each binding that it gives.

    ``env`` binds values, weights (``b`` is 0.0 where there is none), sizes, settings, parameters.
    """
    operators = {**OPERATORS, **rule.kind.functions, **context.functions}
    names = with_lets(env, rule.let, context, operators)
    return {k: evaluate(e, names, operators, context) for k, e in rule.rewrite.items()}


def fold(rule: Rule, env: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate the rule's fold: each weight's new value, in the dtype of ``env``."""
    return values_of(rule.fold, rule, env)


def values_of(
    expressions: Mapping[Any, Expression], rule: Rule, env: Mapping[str, Any]
) -> dict[Any, Any]:
    """Evaluate expressions about a rule's sites: one by one, what is let by the rule only once."""
    names = with_lets(env, rule.let)
    return {name: evaluate(expression, names) for name, expression in expressions.items()}


def penalty(rule: Rule, env: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate the penalty of one site: scalars by how sites are combined (sum, mean).

    ``env`` binds weights, sizes, settings and parameters. Raises PSG133 for what is no number.
    """
    values = values_of(rule.penalty, rule, env)
    for kind, value in values.items():
        expression = rule.penalty[kind]
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            message = f"'{expression.text}' has shape {list(value.shape)}, and a penalty has none"
            raise SurgeryError("PSG133", message, where=expression.where())
    return values


def shape_of(param: Param, rule: Rule, env: Mapping[str, Any]) -> tuple[int, ...]:
    """Evaluate a parameter's shape; ``env`` binds sizes and settings. Raises PSG122."""
    names = with_lets(env, rule.let)
    sizes = [_size(expression, names) for expression in param.shape]
    if math.prod(sizes) > MAX_ELEMENTS:
        message = f"a parameter of shape {sizes} has more than 2^33 elements"
        where = param.shape[0].where() if param.shape else None
        raise SurgeryError("PSG122", message, where=where)
    return tuple(sizes)


def shapes_of(rule: Rule, env: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a rule's parameters; ``env`` binds sizes and settings. Raises PSG122."""
    return {name: shape_of(param, rule, env) for name, param in rule.params.items()}


def _size(expression: Expression, env: Mapping[str, Any]) -> int:
    """One size of a parameter: a whole number, at least 1. PSG122 if it is not."""
    size = evaluate(expression, env)
    if isinstance(size, int) and not isinstance(size, bool) and size >= 1:
        return size
    wanted = "at least 1" if isinstance(size, int | float) and size < 1 else "a whole number"
    message = f"{expression.text} must be {wanted}, and it is {describe_value(size)}"
    parts = [name for name in expression.names if name != expression.text]
    made = ", ".join(f"{name} = {describe_value(env[name])}" for name in parts)
    hint = f"it is the size of a parameter{', of ' if made else ''}{made}"
    raise SurgeryError("PSG122", message, hint, expression.where())


def check_sizes(rule: SaidRule, settings: Mapping[str, Any], let: Mapping[str, Expression]) -> None:
    """Refuse sizes of parameters that are wrong whatever the site: settings alone decide them.

    ``let`` are the numbers of the rule's file. Raises PSG122, and what evaluation raises.
    """
    numbers = {**let, **rule.let}
    names, known = with_lets(settings, numbers), within(numbers, settings)
    for expression in (size for param in rule.params.values() for size in param.shape):
        if known.issuperset(expression.names):
            _size(expression, names)


def group_of(param: Param, rule: Rule, env: Mapping[str, Any]) -> bool | int:
    """The group of sites that share a parameter, or whether all do; ``env`` is that of a shape.

    Raises PSG122 for a group that is no whole number.
    """
    if isinstance(param.shared, bool):
        return param.shared
    group = evaluate(param.shared, with_lets(env, rule.let))
    if not isinstance(group, int) or group < 0:
        message = f"'{param.shared.text}' is {group}, not the number of a group"
        raise SurgeryError("PSG122", message, where=param.shared.where())
    return group


def initial_values(
    rule: Rule,
    env: Mapping[str, Any],
    known: Mapping[str, Tensor],
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Every parameter of a rule before training, in order; what is ``known`` stays as it is.

    ``env`` binds sizes, settings, and the weights that are read. What several parameters have in
    common under a ``let`` name, such as a decomposition, is computed once.
    """
    values: dict[str, Tensor] = {}
    names: dict[torch.dtype, Environment] = {}
    for name, param in rule.params.items():
        dtype = _dtype(param)
        if name in known:
            values[name] = known[name]
        else:
            made = Environment(values, dict.fromkeys(env, env.__getitem__))
            environment = names.setdefault(dtype, _initial_names(param, rule, made))
            shape = shape_of(param, rule, env)
            values[name] = initial(
                param.init, shape, environment, dtype=dtype, device=device, generator=generator
            )
        for other, environment in names.items():
            environment.bind(name, in_dtype(values[name], other))
    return values


def _initial_names(param: Param, rule: Rule, env: Mapping[str, Any]) -> Environment:
    """What initial values of a parameter's dtype read; it computes in that dtype."""
    dtype = _dtype(param)
    return with_lets(mapped(env, lambda value: in_dtype(value, dtype)), rule.let)


def _dtype(param: Param) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, param.dtype)
    return dtype


def weights_read(
    param: Param, rule: Rule, env: Mapping[str, Any] = MappingProxyType({})
) -> frozenset[str]:
    """The weights that a parameter's initial value needs, through ``let`` names too.

    ``env`` binds sizes and settings, which decide what is chosen between.
    """
    return frozenset(rule.kind.weights) & names_in([param.init], rule, env)


def names_in(
    expressions: Iterable[Expression], rule: Rule, env: Mapping[str, Any] = MappingProxyType({})
) -> frozenset[str]:
    """The names that expressions of a rule read, through ``let`` names too."""
    start = [name for expression in expressions for name in names_read(expression, env)]
    made = rule.let
    return frozenset(reach(start, lambda name: names_read(made[name], env) if name in made else ()))


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """A tensor of floating-point numbers in ``dtype``; anything else as it is."""
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float else value
