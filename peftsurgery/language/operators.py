"""The table of operators: what an expression may call.

An operator is a plain function of torch code. The same function inserts nodes when its arguments
are ``fx.Proxy``, infers shapes on fake tensors and computes on real ones, so it must not look at a
tensor's values. Its entry also says how it is written in maths, and which ATen operations it stands
for when an expression is a pattern to find.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

from peftsurgery.arguments import checked
from peftsurgery.errors import SurgeryError

Function = TypeVar("Function", bound=Callable[..., Any])

# Where the shipped operators are. They are imported when the table is first looked into, since they
# need torch, and what reads expressions over other numbers does not.
_SHIPPED = ("peftsurgery.language.builtin_operators", "peftsurgery.language.activations")

_table: dict[str, Operator] = {}


class _Operators(Mapping[str, "Operator"]):
    """The table, with the shipped operators in it."""

    def __getitem__(self, name: str) -> Operator:
        return _known()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_known())

    def __len__(self) -> int:
        return len(_known())


OPERATORS: Mapping[str, Operator] = _Operators()
"""Every operator by name: the shipped ones and those registered with :func:`operator`."""


@dataclass(frozen=True)
class Operator:
    """One entry of the table.

    ``maths`` holds formats over the arguments (``"‖{0}‖"``), the fewest arguments first; without
    any, a call prints as ``name(arguments)``.
    ``aten`` names the ATen operations it stands for in a pattern. A keyword-only parameter called
    ``training`` is filled in by the reading: whether the model is in training mode.
    """

    name: str
    function: Callable[..., Any] = field(repr=False)
    doc: str
    signature: inspect.Signature
    commutative: bool = False
    maths: tuple[str, ...] = ()
    aten: tuple[str, ...] = ()

    @classmethod
    def of(cls, function: Callable[..., Any], name: str | None = None, **more: Any) -> Operator:
        """The entry of a function, which is called by its own name unless another is given."""
        doc = inspect.getdoc(function) or ""
        return cls(name or function.__name__, function, doc, inspect.signature(function), **more)

    @property
    def needs_training(self) -> bool:
        """Whether the operator behaves differently while training, as dropout does."""
        return "training" in self.signature.parameters

    @property
    def usage(self) -> str:
        """The call as a reader would write it: ``linear(x, W, b=None)``."""
        shown = [p for p in self.signature.parameters.values() if p.name != "training"]
        plain = [p.replace(annotation=inspect.Parameter.empty) for p in shown]
        return f"{self.name}{inspect.Signature(plain)}"


@checked
def operator(
    name: str,
    *,
    commutative: bool = False,
    maths: str | tuple[str, ...] = (),
    aten: tuple[str, ...] = (),
) -> Callable[[Function], Function]:
    """Register the decorated function as the operator ``name``; it stays usable as it is.

    Its docstring is what ``peftsurgery rules words`` prints. Raises PSG143 if the name is taken by
    another function: a rule means the same thing wherever it is read.
    """

    def register(function: Function) -> Function:
        known = (_table if function.__module__ in _SHIPPED else _known()).get(name)
        if known is not None and not is_same(known.function, function):
            raise SurgeryError("PSG143", f"there is already an operator '{name}': {known.usage}")
        if not is_word(name):
            raise SurgeryError("PSG143", f"'{name}' cannot be the name of an operator")
        forms = (maths,) if isinstance(maths, str) else maths
        _table[name] = Operator.of(function, name, commutative=commutative, maths=forms, aten=aten)
        return function

    return register


def _known() -> dict[str, Operator]:
    _import_shipped()
    return _table


@cache
def _import_shipped() -> None:
    for module in _SHIPPED:
        importlib.import_module(module)


def is_word(name: str) -> bool:
    """Whether expressions can call something by this name."""
    return name.isidentifier() and name.isascii() and not name.startswith("__")


def is_same(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two functions are one definition, run again by a notebook or a reload."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)
