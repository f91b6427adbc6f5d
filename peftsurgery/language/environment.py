"""Environments: values of a rule's names during one reading.

The readings (:mod:`.readings`) evaluate a rule's expressions over an environment. It binds sizes
and settings, what the match binds, and the parameters: as proxies, fake tensors, tensors or
symbols, whatever the reading is over. Nothing is made before it is read: a fold never touches a
``let`` name that is about activations, and no weight is loaded that no expression names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from peftsurgery.language.evaluation import PLAIN, Context, evaluate
from peftsurgery.language.expression import Expression
from peftsurgery.language.operators import OPERATORS, Operator

Made = Mapping[str, Callable[[str], Any]]


class Environment(Mapping[str, Any]):
    """Lazy mapping of names: ``known`` values, and ones ``made`` when first read."""

    def __init__(self, known: Mapping[str, Any], made: Made = MappingProxyType({})) -> None:
        self._known, self._made = known, made
        self._values: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            is_known = name in self._known
            self._values[name] = self._known[name] if is_known else self._made[name](name)
        return self._values[name]

    def bind(self, name: str, value: Any) -> None:
        """Bind a name for values that are made from here on."""
        self._values[name] = value

    def release(self) -> None:
        """Let go of the values that were made; they are made again if they are read again.

        What makes them refers to the environment, so that they would stay until cycles are
        collected.
        """
        self._values.clear()

    def __contains__(self, name: object) -> bool:
        return name in self._values or name in self._known or name in self._made

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._known, *self._made, *self._values)))

    def __len__(self) -> int:
        return len({*self._known, *self._made, *self._values})


def with_lets(
    env: Mapping[str, Any],
    let: Mapping[str, Expression],
    context: Context = PLAIN,
    operators: Mapping[str, Operator] = OPERATORS,
) -> Environment:
    """``env`` and the ``let`` names of a rule, each computed once."""

    def compute(name: str) -> Any:
        return evaluate(let[name], names, operators, context)

    names = Environment(env, dict.fromkeys(let, compute))
    return names


def mapped(env: Mapping[str, Any], change: Callable[[Any], Any]) -> Environment:
    """Map every value of an environment, lazily."""
    return Environment({}, dict.fromkeys(env, lambda name: change(env[name])))
