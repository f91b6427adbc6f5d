"""Loops over a symbolic number of steps while a model is traced: three turns stand for all.

``range(n)`` of a size that may vary makes Python ask for the number, and the trace takes it for a
constant. Here such a ``range`` gives three turns instead, whose numbers are symbols of their own:
code that decides by one of them (``if i == 0``) is seen by what the trace learns of it. Nodes mark
where a turn begins. What must be the same in every turn is held to that when a turn ends: what
Python keeps between turns here, the steps themselves in :mod:`folding`. Anything else ends the
trace, and the loop is traced as torch.export does it, for the number of steps at hand.
"""

from __future__ import annotations

import enum
import sys
import threading
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import CodeType, FrameType
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch._dynamo.source import ConstantSource
from torch._prims_common import make_contiguous_strides_for
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    maybe_enable_thunkify,
    set_proxy_slot,
    thunkify,
    track_tensor,
)
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from peftsurgery.capture.attributes import MODULE_TABLES, attributes_of, changed_since
from peftsurgery.capture.equal_blocks.likeness import TokenMaker
from peftsurgery.capture.equal_blocks.out_of_sight import OutOfSightError
from peftsurgery.capture.equal_blocks.size_questions import Questions
from peftsurgery.capture.loops.layers import appended, is_recurrent, node_of, recurrence
from peftsurgery.capture.loops.model_range import ModelRange
from peftsurgery.capture.loops.questions import hold_in_every_turn
from peftsurgery.capture.loops.source import JOINS, LoopSource, loop_source
from peftsurgery.errors import SurgeryError

_LIBRARY = torch.library.Library("peftsurgery", "FRAGMENT")
_LIBRARY.define("loop_turn(Tensor[] left, SymInt count, int number, int turn) -> ()")
_LIBRARY.define("loop_index(int number, int turn) -> SymInt")
_LIBRARY.define("loop_joined(Tensor[] values, int number, int dim, bool stacked) -> Tensor")
TURN = torch.ops.peftsurgery.loop_turn.default
INDEX = torch.ops.peftsurgery.loop_index.default
JOINED = torch.ops.peftsurgery.loop_joined.default
_STEADY = (
    *(type, types.ModuleType, types.BuiltinFunctionType, enum.Enum, range, slice),
    *(torch.layout, torch.memory_format, torch.Generator),
)
TURNS = 3
"""One that begins with what was before the loop, one that goes on with what that left, and one more
that is to be like it."""


Place = tuple[CodeType, int]
"""Where a loop is: a function's code, and a line of its file."""


class LoopError(Exception):
    """A loop cannot be kept as one: more goes from turn to turn, or out of it, than is followed.

    ``number`` is which of the trace's loops it is, if that is known; ``places`` are those of the
    loops that had better be traced step by step.
    """

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message)
        self.number = number
        self.places: frozenset[Place] = frozenset()


class Loops:
    """The loops of one trace, but for those at places that are ``left_out``."""

    def __init__(self, module: nn.Module, left_out: Collection[Place] | None = ()) -> None:
        """With None, all are left out."""
        self.module, self.left_out = module, left_out
        self.thread = threading.get_ident()
        self.begun: list[Place] = []
        self.running: _TracedLoop | None = None
        self.lists: dict[int, tuple[_TracedLoop, list[Any]]] = {}

    def range(self, *bounds: Any) -> Any:
        """What ``range`` gives to code of the model: turns for a loop that may be kept."""
        count = bounds[-1] if bounds else None
        mode = get_proxy_mode()
        if (
            threading.get_ident() != self.thread
            or self.running is not None
            or mode is None
            or not isinstance(count, torch.SymInt)
            or count.node.expr.is_number
        ):
            return range(*bounds)
        frame = sys._getframe(2)
        place = frame.f_code, frame.f_lineno
        is_out = self.left_out is None or place in self.left_out
        source = None if is_out else loop_source(*place)
        if source is None or frame.f_globals.get("torch", torch) is not torch:
            return range(*bounds)
        self.begun.append(place)
        return _TracedLoop(self, mode.tracer, frame, source, count)

    def kept_call(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a call gives that joins the values of all turns, or is a loop by itself; or None."""
        values = args[0] if args else None
        mode = get_proxy_mode()
        if mode is not None and not kwargs and is_recurrent(function, args):
            return recurrence(mode.tracer, function, args)
        if self.running is not None and getattr(function, "__name__", "") == "__setitem__":
            return _written(*args)
        if not isinstance(values, list) or id(values) not in self.lists:
            return None
        name = getattr(function, "__name__", "")
        if name not in JOINS:
            raise LoopError(f"a list that a loop fills is given to {name}")
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        if len(args) > 2 or not kwargs.keys() <= {"dim"} or type(dim) is not int:
            raise LoopError("a list that a loop fills is joined in another way")
        return self.lists[id(values)][0].join(values, dim, name == "stack", function)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Let the loops of a model's code be kept within the context.

        LoopError if it fails where there were any, or one was left before its end.
        """
        files = {type(part).__module__ for part in self.module.modules()}
        files = {file for file in files & sys.modules.keys() if not file.startswith("torch.")}
        spaces = [vars(sys.modules[file]) for file in sorted(files)]
        spaces = [space for space in spaces if "range" not in space]
        for space in spaces:
            space["range"] = ModelRange(self.range)
        try:
            with self.placed():
                yield
                if self.running is not None:
                    raise LoopError("a loop was left before its end")
        finally:
            for space in spaces:
                space.pop("range", None)

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Let a LoopError, or another that a loop may be the reason of, say where the loop is."""
        try:
            yield
        except LoopError as error:
            error.places = self._blamed(error.number)
            raise
        except Exception as error:
            if not self.begun or isinstance(error, SurgeryError | OutOfSightError):
                raise
            failed = LoopError(str(error))
            failed.places = self._blamed(None)
            raise failed from error

    def _blamed(self, number: int | None) -> frozenset[Place]:
        """The place of a loop by its number, of the one that runs, or else of all."""
        if number is None and self.running is not None:
            number = self.running.number
        return frozenset(self.begun if number is None else self.begun[number - 1 : number])


class _TracedLoop:
    """The turns of one loop."""

    def __init__(
        self, loops: Loops, tracer: Any, frame: FrameType, source: LoopSource, count: torch.SymInt
    ) -> None:
        self.loops, self.frame = loops, frame
        self.tracer: Any = tracer
        self.source, self.count, self.number = source, count, len(loops.begun)
        self.shapes = count.node.shape_env
        self.indices: list[sympy.Symbol] = []
        self.before: list[dict[str, Any]] = []  # what Python kept as each turn began
        self.attributes = attributes_of(loops.module, copied=False)
        self.calls = dict(tracer.num_calls)
        self.around: list[Any] = []  # what there was beside, after the first turn and the last
        self.tokens = TokenMaker(), TokenMaker()
        free = frame.f_code.co_freevars
        self.function = None if free else types.FunctionType(frame.f_code, frame.f_globals)
        self.questions = Questions(self.shapes)

    def __iter__(self) -> Iterator[Any]:
        if self.loops.running is not None:
            raise LoopError("a loop within a loop")
        self.loops.running = self
        if not self.count >= 1:  # a condition of the capture from now on
            raise LoopError("a loop without a turn")
        self.questions.__enter__()
        return self

    def __next__(self) -> Any:
        frame = sys._getframe(1)
        if frame is not self.frame or self.loops.running is not self:
            raise LoopError("a loop goes on elsewhere than where it began")
        here = {name: value for name, value in frame.f_locals.items() if name != self.source.index}
        self.before.append(self._told(here))
        turn = len(self.indices)
        if turn in (1, TURNS):
            self.around.append(self._around())
        count = get_proxy_slot(self.count, self.tracer).force().node
        self._append(TURN, (self._left(here) if turn else [], count, self.number, turn))
        if turn == TURNS:
            self._end(here)
            raise StopIteration
        return self._index(turn)

    def _index(self, turn: int) -> torch.SymInt:
        """The number of a turn: a symbol, which is known to be from nought to their count."""
        source = ConstantSource(f"loop_{self.number}_{turn}")
        symbol = self.shapes.create_unspecified_symbol(0, source, DimDynamic.DYNAMIC)
        self.shapes.var_to_range[symbol] = ValueRanges(0, int_oo)
        for known in (symbol < self.count.node.expr, symbol + 1 <= self.count.node.expr):
            self.shapes.axioms.update(dict(self.shapes.get_implications(known)))
        self.indices.append(symbol)
        index = self.shapes.create_symintnode(symbol, hint=0, source=source)
        node = self._append(INDEX, (self.number, turn))
        node.meta["val"] = index
        proxy = fx.Proxy(node, self.tracer)
        set_proxy_slot(index, self.tracer, thunkify(self.tracer, lambda: proxy))
        return index

    def _append(self, target: Any, args: tuple[Any, ...]) -> fx.Node:
        return appended(self.tracer, target, args)

    def _left(self, here: Mapping[str, Any]) -> list[fx.Node]:
        """The tensors that a turn leaves in what it assigns."""
        names = sorted(self.source.assigned & here.keys())
        leaves = pytree.tree_leaves([here[name] for name in names])
        nodes = [node_of(leaf, self.tracer) for leaf in leaves if isinstance(leaf, torch.Tensor)]
        return [node for node in nodes if node is not None]

    def _told(self, here: Mapping[str, Any]) -> dict[str, Any]:
        """What Python keeps between two turns, but for tensors."""
        passing = self.source.fresh - self.source.read_behind
        return {
            name: _told(value)
            for name, value in here.items()
            if name not in passing and not (name in self.source.joined and type(value) is list)
        }

    def _around(self) -> Any:
        """What the function's module keeps, and the code that it may call."""
        tokens = self.tokens[len(self.around)]
        owner = self.frame.f_locals.get("self")
        owner = owner if isinstance(owner, nn.Module) else self.loops.module
        parts = list(owner.named_modules(remove_duplicate=False))
        kinds = [tokens.of_class(kind) for kind in dict.fromkeys(type(part) for _, part in parts)]
        kept = [
            (name, key, tokens.of(value))
            for name, part in parts
            for key, value in vars(part).items()
            if key not in MODULE_TABLES and (part is not self.loops.module or key != "forward")
        ]
        return kept, kinds, tokens.of(self.function)

    def _end(self, here: Mapping[str, Any]) -> None:
        """Hold the turns to being alike. LoopError if they are not."""
        first, *others = self.before[1:]
        if any(other != first for other in others) or self.around[0] != self.around[1]:
            raise LoopError("more than tensors goes from one turn to the next")
        for name in self.source.joined & here.keys():
            values = here[name]
            if type(values) is list and values:
                if len(values) != TURNS or not all(type(v) is FakeTensor for v in values):
                    raise LoopError(f"'{name}' is filled by more than one tensor a turn")
                self.loops.lists[id(values)] = self, values
        if changed_since(self.attributes) or dict(self.tracer.num_calls) != self.calls:
            raise LoopError("a turn changes attributes of modules, or calls some")
        self.questions.__exit__()
        if not hold_in_every_turn(self.questions, self.indices, self.count.node.expr):
            raise LoopError("it is decided by the number of a turn")
        self.loops.running = None
        del self.frame, self.attributes, self.before, self.around, self.tokens

    def join(self, values: list[Any], dim: int, stacked: bool, function: Any) -> torch.Tensor:
        """A tensor of the values of all turns, as the trace knows it."""
        nodes = [node_of(value, self.tracer) for value in values]
        mode = get_proxy_mode()
        if None in nodes or mode is None or mode.tracer is not self.tracer:
            raise LoopError("a loop is joined outside of the trace")
        with torch._C.DisableTorchFunction(), disable_proxy_modes_tracing():
            few = function(values, dim)
            if list(map(str, few.stride())) != list(map(str, _strides(few))):
                raise LoopError("what a loop makes is joined in another layout")
            size = 1 if stacked else values[0].shape[dim]
            sizes = list(few.shape)
            sizes[dim] = size * self.count
            made = few.narrow(dim, 0, 1).expand(sizes)
            made = made.clone(memory_format=torch.contiguous_format)
        node = self._append(JOINED, (nodes, self.number, dim % few.dim(), stacked))
        node.meta["val"] = made
        with maybe_enable_thunkify():
            track_tensor(made, fx.Proxy(node, self.tracer), constant=None, tracer=self.tracer)
        return made


def _written(target: Any, index: Any, value: Any) -> Any:
    """``target[index] = value`` as the two steps that it is: a view, and a copy into that.

    In one step, Python makes numbers of symbols. None for what may be more than these two.
    """
    places = index if isinstance(index, tuple) else (index,)
    is_view = all(type(each) in (int, torch.SymInt, slice) for each in places)
    if not is_view or not any(
        isinstance(each, torch.SymInt) for each in pytree.tree_leaves(places)
    ):
        return None
    view = target[index]
    if not isinstance(value, torch.Tensor):
        return None
    if list(map(str, view.shape)) != list(map(str, value.shape)):  # it is broadcast
        return None
    view.copy_(value)
    return target


def _strides(tensor: torch.Tensor) -> Sequence[Any]:
    return make_contiguous_strides_for(tensor.shape)


def _told(value: Any, depth: int = 4) -> Any:
    """A value to be compared with one of another turn: tensors are taken to be alike."""
    if isinstance(value, torch.Tensor):
        return torch.Tensor
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return str(value.node.expr)
    if isinstance(value, list | tuple | dict) and depth:
        items = value.items() if isinstance(value, dict) else value
        return type(value), [_told(item, depth - 1) for item in items]
    if isinstance(value, int | float | complex | str | bytes | None | torch.dtype | torch.device):
        return type(value), repr(value)
    if isinstance(value, set | frozenset):
        return id(value), len(value)
    if isinstance(value, types.MethodType):
        return id(value.__func__), _told(value.__self__, depth)
    if isinstance(value, types.FunctionType):
        return id(value), [_told(_content(cell), depth - 1) for cell in value.__closure__ or ()]
    if isinstance(value, (*_STEADY, nn.Module)) or not depth:
        return id(value)
    if not hasattr(value, "__dict__") or hasattr(value, "__next__"):
        return object()  # what it holds cannot be seen
    return id(value), [(key, _told(item, depth - 1)) for key, item in vars(value).items()]


def _content(cell: types.CellType) -> Any:
    """What a closure's cell holds; nothing if it is empty."""
    with suppress(ValueError):
        return cell.cell_contents
    return None
