"""What a module's forward computes, step by step, as far as two runs can be told apart by it.

While a forward runs, every call of a function of torch is noted: the function, its arguments
(tensors by a number), whether gradients are recorded and casts are automatic. Two runs with equal
records are one graph; two that differ only in flags of dropouts and norms are one graph that
follows these flags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._export.utils import _compiling_state_context
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.utils.stateless import _reparametrize_module
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from peftsurgery.capture.attributes import attributes_of, changed_since, tensors_of
from peftsurgery.capture.decided import Decisions, of_sizes
from peftsurgery.capture.loops.traced import Loops
from peftsurgery.capture.randomness import TRAIN_FLAGS
from peftsurgery.capture.signature import Call, map_tensors
from peftsurgery.capture.tensors import named_tensors

# Functions that give no tensor and change what others compute.
_SWITCHES = ("_set_grad_enabled", "__setitem__")


@dataclass(frozen=True)
class Step:
    """One call of a function of torch; ``flags`` are its arguments that tell training from eval."""

    function: Any
    arguments: tuple[Any, ...]
    flags: tuple[tuple[str, Any], ...]
    state: tuple[bool, bool]


@dataclass
class Record:
    """The steps of a run, and what it returned."""

    steps: list[Step] = field(default_factory=list)
    output: Any = None

    def is_off_of(self, trained: Record) -> bool:
        """Whether this eval-mode run equals train-mode run ``trained`` with train flags off."""
        return self.output == trained.output and all(
            one is not None and two is not None and _is_off_of(one, two)
            for one, two in zip_longest(self.steps, trained.steps)
        )


def _is_off_of(evaluated: Step, trained: Step) -> bool:
    if (evaluated.function, evaluated.arguments, evaluated.state) != (
        trained.function,
        trained.arguments,
        trained.state,
    ):
        return False
    return not any(value for _, value in evaluated.flags)


def recorded(module: nn.Module, call: Call, decided: bool = False) -> Record:
    """Record the torch calls that ``module`` makes for a call, on tensors without content.

    With ``decided``, what it asks of the inputs' values is answered by the call's.
    """
    watch = Watch(module)
    watch.decisions = Decisions(module, call.tensors) if decided else None
    with _without_content(module, call) as inputs:
        watch.run(module, **inputs)
    return watch.record


@contextmanager
def _without_content(module: nn.Module, call: Call) -> Iterator[Mapping[str, Any]]:
    """The module with tensors that have no content, and the inputs of the call as such."""
    # sizes stay numbers; what the model asks of contents, and asserts, becomes a symbol
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    tensors: dict[str, torch.Tensor] = {
        name: mode.from_tensor(tensor) for name, tensor in named_tensors(module)
    }
    with mode, _compiling_state_context(), _reparametrize_module(module, tensors):
        yield map_tensors(call, mode.from_tensor).tensors


def is_steady(module: nn.Module, call: Call) -> bool:
    """Whether a second call repeats the first, although the first may set attributes.

    A call that goes on computing with a tensor of the one before does not; one that computes less,
    since it finds what the one before made, does.
    """
    watch = Watch(module)
    with _without_content(module, call) as inputs:
        watch.run(module, **inputs)
        first, made = watch.record, watch.made
        again = Watch(module, earlier=made)
        again.run(module, **inputs)
    if again.met_earlier:
        return len(again.record.steps) < len(first.steps)
    return again.record == first


class Watch(TorchFunctionMode):
    """Notes every call of a function of torch that computes something, and attributes that are set.

    What batch norms count is left out: they count in train mode only.
    """

    def __init__(self, module: nn.Module, earlier: Sequence[torch.Tensor] = ()) -> None:
        """``earlier`` are tensors of another run; the watch notes whether one of them is met."""
        super().__init__()
        self.module = module
        self.earlier = {id(tensor) for tensor in earlier}
        self.met_earlier = False
        self.changed: list[str] = []
        self.made: list[torch.Tensor] = []
        self.record = Record()
        self.names: dict[int, str] = {}
        self.numbers: dict[int, int | str] = {}
        self.kept: list[Any] = []  # so that no other tensor has its identity
        self.guard: Callable[[], AbstractContextManager[None]] = nullcontext
        self.check: Callable[[torch.Tensor], None] | None = None  # of every tensor that is made
        self.decisions: Decisions | None = None  # taken by values, if they are
        self.loops: Loops | None = None  # kept as loops, if they are
        self.norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What ``forward`` returns, with its steps in a new record."""
        self.record, self.numbers, self.kept, self.made = Record(), {}, [], []
        for value in pytree.tree_leaves((args, kwargs)):
            self.number(value)
        before = attributes_of(self.module, copied=False)
        self.names = {id(tensor): name for name, tensor in tensors_of(self.module)}
        if self.decisions is not None:
            self.decisions.begin(kwargs)
        with self, self.guard():
            output = forward(*args, **kwargs)
        self.changed = changed_since(before)
        self.record.output = self.plain(output)
        return output

    def number(self, value: Any) -> int | str:
        """The number of a tensor, in the order in which the run met them; the name of a weight.

        Runs that take another weight each are not the same, so a weight is known by its name.
        """
        if id(value) not in self.numbers:
            self.met_earlier |= id(value) in self.earlier
            self.numbers[id(value)] = self.names.get(id(value), len(self.numbers))
            self.kept.append(value)
        return self.numbers[id(value)]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What the function returns."""
        kwargs = kwargs or {}
        if self.decisions is not None:
            answer = self.decisions.answer(func, args)
            answer = of_sizes(func, args, kwargs) if answer is None else answer
            if answer is not None:
                return answer
        kept = None if self.loops is None else self.loops.kept_call(func, args, kwargs)
        result = func(*args, **kwargs) if kept is None else kept
        if self.decisions is not None:
            self.kept.append(result)
            self.decisions.note(func, args, kwargs, result)
        name = getattr(func, "__name__", "")
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if not made and name not in _SWITCHES:
            return result
        if args and self.counts(args[0]):
            return result
        step = self.step(func, name, args, kwargs)
        self.record.steps.append(step)
        if step.flags and args and result is args[0] and not kwargs.get("inplace"):
            result = result.view_as(result)  # a dropout that is off is a step of its own too
            made = [result]
        for tensor in made:
            self.number(tensor)
            if self.check is not None:
                self.check(tensor)
        given = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs))}
        self.made += [tensor for tensor in made if id(tensor) not in given]
        return result

    def counts(self, value: Any) -> bool:
        """Whether a tensor is the counter of a batch norm."""
        return any(norm.num_batches_tracked is value for norm in self.norms)

    def step(self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Step:
        """Record of one torch call: function, arguments and train flags, in comparable form."""
        positions = _flag_positions(name)
        flags = {positions[i]: value for i, value in enumerate(args) if i in positions}
        flags |= {key: value for key, value in kwargs.items() if key in TRAIN_FLAGS}
        if _has_no_statistics(name, args, kwargs):
            flags = {}
        rest = tuple(None if i in positions else value for i, value in enumerate(args))
        others = {key: value for key, value in kwargs.items() if key not in TRAIN_FLAGS}
        state = (torch.is_grad_enabled(), torch._C._is_any_autocast_enabled())
        return Step(func, self.plain((rest, others)), tuple(sorted(flags.items())), state)

    def plain(self, value: Any) -> tuple[Any, ...]:
        """Comparable form of a call's arguments, equal for equal arguments of another run."""
        leaves, spec = pytree.tree_flatten(value)
        return (str(spec), *(self.leaf(leaf) for leaf in leaves))

    def leaf(self, leaf: Any) -> Any:
        """Comparable form of one leaf value, equal for equal values of another run."""
        if isinstance(leaf, torch.Tensor):
            return ("tensor", self.number(leaf))
        if isinstance(leaf, slice):
            return ("slice", *(self.leaf(end) for end in (leaf.start, leaf.stop, leaf.step)))
        if isinstance(leaf, np.ndarray):
            return (leaf.shape, leaf.tobytes())
        if isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool):
            leaf = leaf.node.hint
        return (type(leaf), repr(leaf))


def _has_no_statistics(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether it is a norm that keeps no statistics: it takes the batch's in eval mode too."""
    mean = args[1] if len(args) > 1 else kwargs.get("running_mean")
    return name in ("batch_norm", "instance_norm") and mean is None


@lru_cache(maxsize=1024)
def _flag_positions(name: str) -> dict[int, str]:
    """The positions of train flags among the arguments of the operators of that name."""
    packet = getattr(torch.ops.aten, name, None) if name else None
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return {}
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    return {
        position: argument.name
        for schema in schemas
        for position, argument in enumerate(schema.arguments)
        if argument.name in TRAIN_FLAGS
    }
