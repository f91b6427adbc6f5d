"""How a model keeps a weight that is not trained: ``store: nf4(block, double)``.

``store`` is an expression over the settings that calls one entry of this table. What it says is
carried out by surgery: the model holds the packed weight, and its graphs read the weight through
it.

Sources: NF4, double quantisation: Dettmers et al., 2023, arXiv:2305.14314, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peftsurgery.errors import SurgeryError
from peftsurgery.language.evaluation import evaluate
from peftsurgery.language.expression import Expression
from peftsurgery.language.operators import Operator

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
COMPUTE = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Storage:
    """Four bits a number: ``block`` numbers share a scale, and the scales are quantised if double.

    ``compute`` is the dtype that products with the weight are computed in; None is the model's.
    """

    format: str
    block: int
    double: bool
    compute: str | None


def nf4(block: int = 64, double: bool = True, compute: str | None = None) -> Storage:
    """Four bits whose values are quantiles of the normal distribution."""
    return _checked(Storage("nf4", block, double, compute))


def fp4(block: int = 64, double: bool = True, compute: str | None = None) -> Storage:
    """Four bits as a floating point number."""
    return _checked(Storage("fp4", block, double, compute))


STORES: Mapping[str, Operator] = {
    function.__name__: Operator.of(function) for function in (nf4, fp4)
}
"""The ways to store a weight, by name."""


def storage_of(expression: Expression, settings: Mapping[str, Any]) -> Storage:
    """What a rule's ``store`` says with these settings. PSG146 if it is no way to store."""
    value = evaluate(expression, settings, STORES)
    if not isinstance(value, Storage):
        message = f"'{expression.text}' is {value!r}, no way to store a weight"
        raise SurgeryError("PSG146", message, "write nf4() or fp4()", expression.where())
    return value


def _checked(storage: Storage) -> Storage:
    wrong = None
    if storage.block not in BLOCKS or isinstance(storage.block, bool):
        wrong = f"blocks of {storage.block!r} numbers", ", ".join(map(str, BLOCKS))
    elif storage.compute is not None and storage.compute not in COMPUTE:
        wrong = f"computing in {storage.compute!r}", ", ".join(COMPUTE)
    elif not isinstance(storage.double, bool):
        wrong = f"double = {storage.double!r}", "true or false"
    if wrong is not None:
        raise SurgeryError("PSG146", f"{storage.format} has no {wrong[0]}", f"it has {wrong[1]}")
    return storage
