"""Decisions that a forward takes by what is in its inputs: taken as the call has them, and noted.

    if tokens.eq(pad).any():                    a mask that masks nothing is left out
    is_global = (mask > 1).any().item()         which of two ways to attend

A trace has no values. Where it cannot go on without, what is made of the inputs alone is computed
for the call's own inputs, and the answer becomes a condition of the capture. What depends on
weights stays undecided.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from peftsurgery.capture.model_lines import model_line
from peftsurgery.capture.tensors import is_plain
from peftsurgery.errors import SurgeryError

_ASK = ("item", "__bool__", "__int__", "__float__", "__index__", "tolist")
# Methods of tensors that are no operators, and functions that make a tensor of numbers.
_PLAIN = ("__getitem__", "__setitem__", "bool", "float", "long", "int", "double", "half")
_MADE = ("arange", "ones", "zeros", "full")


@dataclass(frozen=True, eq=False)
class Formula:
    """A tensor as a function of others: ``args`` and ``kwargs`` have these, or names of inputs."""

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def sizes_fixed(self) -> Formula:
        """The same where every size is the number that it is, which the trace then assumes."""

        def known(value: Any) -> Any:
            if isinstance(value, Formula):
                return value.sizes_fixed()
            return int(value) if isinstance(value, torch.SymInt) else value

        return Formula(self.function, *pytree.tree_map(known, (self.args, self.kwargs)))

    def of(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        """What the function returns for these inputs."""

        def real(value: Any) -> Any:
            if isinstance(value, Formula):
                return value.of(inputs)
            return inputs[value.name] if isinstance(value, Input) else value

        args, kwargs = pytree.tree_map(real, (self.args, self.kwargs))
        return self.function(*args, **kwargs)


@dataclass(frozen=True)
class Input:
    """An input of the call, by name."""

    name: str


@dataclass(frozen=True)
class Decision:
    """A value that a capture takes for granted, and where the model's code asks for it."""

    made: Formula
    value: Any
    where: str

    def holds(self, inputs: Mapping[str, Any]) -> bool:
        """Whether it is the same for these inputs. Those without content are taken to agree."""
        if not all(is_plain(value) for value in inputs.values() if torch.is_tensor(value)):
            return True
        return bool(self.made.of(inputs) == self.value)

    def __str__(self) -> str:
        return f"exact where {self.where} is {self.value}; for others it is captured again"


@dataclass
class Decisions:
    """Decisions of one trace of a call, by its tensors' values."""

    module: nn.Module
    inputs: Mapping[str, Any]
    taken: list[Decision] = field(default_factory=list)
    _known: dict[int, Formula | Input] = field(default_factory=dict)
    _memory: dict[int, int] = field(default_factory=dict)

    def begin(self, given: Mapping[str, Any]) -> None:
        """Know the inputs of a trace by name: those whose values the call has."""
        self._known = {
            id(value): Input(name)
            for name, value in given.items()
            if isinstance(value, torch.Tensor) and is_plain(self.inputs[name])
        }
        self._memory = {
            id(value): _memory(value) for value in given.values() if id(value) in self._known
        }

    def answer(self, function: Any, args: Sequence[Any]) -> Any:
        """What the call's own inputs say where code asks for a whole number, or yes or no.

        None if they cannot.
        """
        made = self._known.get(id(args[0])) if args else None
        if made is None or getattr(function, "__name__", "") not in _ASK:
            return None
        asked = Formula(function, (made,), {}).sizes_fixed()
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            value = asked.of(self.inputs)
        if any(isinstance(each, float) for each in pytree.tree_leaves(value)):
            return None  # hardly two calls have one answer
        where = model_line(traceback.extract_stack(), self.module)
        self.taken.append(Decision(asked, value, where))
        return value

    def note(
        self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], made: Any
    ) -> None:
        """Know what a function makes of what is known, or writes into it."""
        name = getattr(function, "__name__", "")
        given = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        is_known = all(id(value) in self._known for value in given)
        told = pytree.tree_map(lambda value: self._known.get(id(value), value), (args, kwargs))
        if _writes(name) and given:
            self._forget(given[0])
            made, function = given[0], _copied(function)
        if is_known and isinstance(made, torch.Tensor) and _is_told(name, bool(given)):
            self._known[id(made)] = Formula(function, *told)
            self._memory[id(made)] = _memory(made)

    def _forget(self, written: torch.Tensor) -> None:
        """Know nothing any more of what shares the memory of a tensor that is written."""
        lost = [key for key, memory in self._memory.items() if memory == _memory(written)]
        for key in lost:
            del self._known[key], self._memory[key]


def check_undecided(decisions: Iterable[Decision], file: str) -> None:
    """Refuse to write a graph that is right for some values of its inputs as if it were for all.

    PSG229.
    """
    for decision in decisions:
        message = f"the graph is right where {decision.where} is {decision.value}"
        raise SurgeryError("PSG229", message, f"{file} cannot say so: fold the model instead")


def is_by_value(error: BaseException | None) -> bool:
    """Whether torch.export gave up since it met a decision by a value."""
    return error is not None and "data-dependent" in str(error)


def of_sizes(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The quotient of two sizes that a forward divides as if they were tensors; None for others."""
    mode = kwargs.get("rounding_mode")
    if function is not torch.div or mode not in ("trunc", "floor") or len(args) != 2:
        return None
    is_whole = all(isinstance(arg, int | torch.SymInt) for arg in args)
    return args[0] // args[1] if is_whole else None


def _is_told(name: str, has_tensors: bool) -> bool:
    """Whether a function's arguments alone say what it returns."""
    if not has_tensors:
        return name in _MADE
    if name in _PLAIN:
        return True
    names = (name, name.strip("_"))
    found = (getattr(torch.ops.aten, each, None) for each in names)
    packet = next((each for each in found if isinstance(each, torch._ops.OpOverloadPacket)), None)
    if packet is None:
        return False
    tags = (getattr(packet, overload).tags for overload in packet.overloads())
    return not any(torch.Tag.nondeterministic_seeded in found for found in tags)


def _memory(tensor: torch.Tensor) -> int:
    """What a tensor and its views have in common."""
    return int(tensor.untyped_storage()._cdata)


def _copied(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that writes into its first argument, as one that returns what it wrote."""

    def write(target: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        written = target.clone()
        function(written, *args, **kwargs)
        return written

    return write


def _writes(name: str) -> bool:
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
