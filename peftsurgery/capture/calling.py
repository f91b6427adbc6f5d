"""Calling a part as the original calls it: with its args and kwargs, for its result.

The program around a part calls a :class:`PartCall`, which calls the module that is in the part's
place, with its hooks. Where that comes to the part's own forward, the part runs its program. What
the program takes or gives beside the arguments and the result goes past the hooks.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from peftsurgery.capture.copying import SharedByCopies
from peftsurgery.capture.module_calls import ModuleCall, flatten
from peftsurgery.capture.program import Program
from peftsurgery.errors import SurgeryError


@dataclass(frozen=True, eq=False)
class PartCall(SharedByCopies):
    """How a program calls a part, which has a ``name`` in its holder; it is a function of a graph.

    ``values`` come with the call. ``given`` says for each argument's leaf which of them it is,
    ``inputs`` for each input of the part's ``program`` which argument's leaf it is (None: the next
    of the values that are no argument), ``outputs`` for each leaf of the result which output of the
    program it is, and ``through`` which argument's leaf. None everywhere else: constants.
    """

    path: str
    name: str
    call: ModuleCall
    program: Program
    given: tuple[int | None, ...]
    inputs: tuple[int | None, ...]
    beside: tuple[int, ...]
    outputs: tuple[int | None, ...]
    through: tuple[int | None, ...]
    count: int
    single: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "__name__", "call_part")

    def __call__(self, holder: Any, *values: Any) -> Any:
        """Call the module at the part's path, and return the values that the calling program reads.

        PSG221 if a hook, or the module in its place, changed what cannot be taken on.
        """
        part = holder.original_part(self.name)
        leaves = [
            leaf.constant if position is None else values[position]
            for leaf, position in zip(self.call.given, self.given, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self.call.arguments)
        with _running(part, self, values) as running:
            result = holder._modules[self.name](*args, **kwargs)
        return _taken(running, leaves, result)


@dataclass(eq=False)
class _Running:
    """State of one running call: its arguments, and the outputs of the part's program."""

    part: Any
    plan: PartCall
    values: Sequence[Any]
    outputs: list[Any] | None = None


class _Stack(threading.local):
    def __init__(self) -> None:
        self.calls: list[_Running] = []


_STACK = _Stack()


def pass_on(value: Any) -> Any:
    """Return a value unchanged: the graph's node for a module that computes nothing."""
    return value


def run_part(part: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], run: Any) -> Any:
    """What the original's module returns for these arguments, by the part's program.

    ``run`` runs a program with its inputs. PSG204 if the part is called by anything but the model.
    """
    running = next((call for call in reversed(_STACK.calls) if call.part is part), None)
    if running is None and _STACK.calls and _stands_in(part, _STACK.calls[-1].plan.program):
        running = _STACK.calls[-1]
    if running is None:
        message = f"this {type(part).__name__} cannot be called by itself"
        hint = "call the model; hooks, and modules put in its place, see its calls"
        raise SurgeryError("PSG204", message, hint)
    plan = running.plan
    leaves = _leaves(part, plan, tuple(args), kwargs)
    beside = iter(plan.beside)
    inputs = [
        running.values[next(beside)] if leaf is None else leaves[leaf] for leaf in plan.inputs
    ]
    result = run(plan.program, inputs)
    running.outputs = [result] if plan.single else list(result)
    count = len(plan.outputs)
    returned = [_returned(plan, number, running.outputs, leaves) for number in range(count)]
    return pytree.tree_unflatten(returned, plan.call.result)


def _stands_in(part: nn.Module, program: Program) -> bool:
    """Whether a block replaces one of equal structure, so that it runs the same program."""
    return vars(part).get("programs", {}).get(program.label) is program


@contextmanager
def _running(part: Any, plan: PartCall, values: Sequence[Any]) -> Iterator[_Running]:
    running = _Running(part, plan, values)
    _STACK.calls.append(running)
    try:
        yield running
    finally:
        _STACK.calls.remove(running)


def _returned(plan: PartCall, number: int, outputs: Sequence[Any], leaves: Sequence[Any]) -> Any:
    """One leaf of the result."""
    output, through = plan.outputs[number], plan.through[number]
    if output is not None:
        return outputs[output]
    return plan.call.returned[number].constant if through is None else leaves[through]


def _taken(running: _Running, given: Sequence[Any], result: Any) -> Any:
    """The outputs of the part's program, with those in the result as it came back."""
    plan = running.plan
    returned, structure = flatten(result)
    if structure != plan.call.result:
        raise _changed(plan, "returns another structure than the original")
    outputs = running.outputs or [_NOTHING] * plan.count
    for number, leaf in enumerate(returned):
        output = plan.outputs[number]
        if output is not None:
            outputs[output] = leaf
        elif not _equal(leaf, _returned(plan, number, (), given)):
            raise _changed(plan, "returns something else in the place of a value it only passes on")
    if any(output is _NOTHING for output in outputs):
        raise _changed(plan, "does not compute a value that other parts of the model need")
    return outputs[0] if plan.single else tuple(outputs)


_NOTHING = object()


def _equal(one: Any, other: Any) -> bool:
    plain = type(one) is type(other) and isinstance(one, int | float | str)
    return one is other or (plain and one == other)


def _leaves(part: nn.Module, plan: PartCall, args: tuple[Any, ...], kwargs: Any) -> list[Any]:
    """The arguments' leaves in the plan's order, however they are divided into args and kwargs."""
    leaves, structure = flatten((args, kwargs))
    if structure == plan.call.arguments:
        return leaves
    order = list(range(len(plan.given)))
    expected = _bound(part, *pytree.tree_unflatten(order, plan.call.arguments))
    found = _bound(part, args, kwargs)
    if expected is None or found is None or expected.keys() != found.keys():
        raise _changed(plan, "is given other arguments than in the original")
    result: list[Any] = [None] * len(order)
    for name, numbers in expected.items():
        numbers, inner = flatten(numbers)
        values, structure = flatten(found[name])
        if structure != inner:
            raise _changed(plan, f"is given another '{name}' than in the original")
        for number, value in zip(numbers, values, strict=True):
            result[number] = value
    return result


def _bound(part: nn.Module, args: tuple[Any, ...], kwargs: Any) -> dict[str, Any] | None:
    """Arguments by the names that the original's forward has for them."""
    try:
        bound = inspect.signature(original_forward(type(part))).bind(part, *args, **kwargs)
    except (TypeError, ValueError):
        return None
    return dict(list(bound.arguments.items())[1:])


def original_forward(kind: type) -> Callable[..., Any]:
    """The forward of the original's class, of a class that is a part's and the original's."""
    theirs = [base for base in kind.__mro__ if not hasattr(base, "original_part")]
    return next(vars(base)["forward"] for base in theirs if "forward" in vars(base))


def _changed(plan: PartCall, what: str) -> SurgeryError:
    message = f"'{plan.path}', with its hooks or with what is in its place, {what}"
    return SurgeryError("PSG221", message, "return what the original returns, with other values")
