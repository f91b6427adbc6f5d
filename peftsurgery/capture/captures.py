"""The captures of one model: made when a call first needs them, shared by all models made of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from peftsurgery.capture.blocks import Library, Splitter, block_paths
from peftsurgery.capture.cleanup import clean_up
from peftsurgery.capture.copying import SharedByCopies
from peftsurgery.capture.decided import Decision
from peftsurgery.capture.equal_blocks.situations import told_by_number
from peftsurgery.capture.export import export
from peftsurgery.capture.generating import cache_argument
from peftsurgery.capture.idle_masks import without_idle_masks
from peftsurgery.capture.module_calls import ModuleCalls, noted_calls
from peftsurgery.capture.modules import module_infos
from peftsurgery.capture.parts import named_parts
from peftsurgery.capture.program import Program
from peftsurgery.capture.returned import Build, builder
from peftsurgery.capture.same_model import Told, told_of
from peftsurgery.capture.signature import Call, example, map_tensors, widen
from peftsurgery.capture.sizes import Check, compile_check, in_words, is_limit
from peftsurgery.capture.sources import Source
from peftsurgery.capture.surroundings import Surroundings, outside, surroundings
from peftsurgery.capture.tensors import (
    is_fake,
    is_plain,
    owner_of,
    tensor_infos,
    tensor_names,
    traceable,
)
from peftsurgery.capture.threads import known_or_made, traced_alone
from peftsurgery.capture.writes import check_writes
from peftsurgery.errors import SurgeryError
from peftsurgery.uncollected import uncollected


@dataclass(frozen=True)
class Capture(SharedByCopies):
    """One signature of a model as programs: "" is the top graph, other keys are block paths.

    ``names`` are the inputs' names in order, ``conditions`` what their sizes must satisfy, and
    ``mode`` is the value of ``training`` the capture is for (None: it follows). ``call`` is the
    call it was made for, with tensors on meta, and ``state`` what surrounded that. ``calls`` are
    those of its modules, by path. ``decisions`` are what was decided by the inputs' values.
    ``returned`` makes of its flat outputs what the original returns.
    """

    programs: Mapping[str, Sequence[Program]]
    output: pytree.TreeSpec
    names: tuple[str, ...]
    conditions: tuple[str, ...]
    mode: bool | None
    call: Call
    state: Surroundings
    calls: ModuleCalls = field(repr=False, compare=False)
    decisions: tuple[Decision, ...] = field(default=(), repr=False, compare=False)
    _check: Check = field(init=False, repr=False, compare=False)
    returned: Build = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "returned", builder(self.output))
        object.__setattr__(self, "_check", compile_check(self.names, self.conditions))

    @property
    def top(self) -> Program:
        """The program of the model itself."""
        return self.programs[""][0]

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what the capture specialised: sizes fixed or bounded, and the mode.

        That inputs have a size in common goes without saying, and other sizes and the other mode
        are captured when they come.
        """
        limits = tuple(in_words(text) for text in self.conditions if is_limit(text))
        limits = (*limits, *dict.fromkeys(map(str, self.decisions)))
        if self.mode is None:
            return limits
        return (*limits, f"for {'train' if self.mode else 'eval'} mode only")

    def fits(self, leaves: Sequence[Any], training: bool) -> bool:
        """Whether the capture is for this mode, and for inputs of these sizes and values."""
        if self.mode not in (None, training) or not all(self._check(*leaves)):
            return False
        return all(
            each.holds(dict(zip(self.names, leaves, strict=True))) for each in self.decisions
        )

    def unmet(self, leaves: Sequence[Any]) -> list[str]:
        """The conditions on sizes and values that these inputs violate."""
        unmet = [text for text, met in self._checked(leaves) if not met]
        inputs = dict(zip(self.names, leaves, strict=True))
        return unmet or [str(each) for each in self.decisions if not each.holds(inputs)]

    def _checked(self, leaves: Sequence[Any]) -> Iterable[tuple[str, bool]]:
        return zip(self.conditions, self._check(*leaves), strict=True)


@dataclass(frozen=True)
class _Begun:
    """The first capture of a model of files, with what it was made of and what came with it."""

    told: Told
    key: Key
    capture: Capture
    library: Library
    constants: Mapping[str, torch.Tensor]
    likely: tuple[str, ...] | None


# The tensors, by name, that have another dtype now than when the model was captured.
Casts = frozenset[tuple[str, torch.dtype]]
# What a capture is found by.
Key = tuple[str, Casts, Surroundings]
# By the place of its files, the captures of the model of them that was captured last, if any lives.
_LATEST: WeakValueDictionary[str, Captures] = WeakValueDictionary()


class Captures(SharedByCopies):
    """The captures of one source: by signature, by its tensors' dtypes, by what surrounds a call.

    ``cache`` is whether calls return what the model remembers without being asked for it, ``past``
    the name of the argument by which the model takes that, or None if it takes no cache. The first
    capture is ``shared`` with a model of the same files that was captured before.
    """

    def __init__(self, source: Source, cache: bool = False, shared: bool = False) -> None:
        self.source = source
        self.shared = shared and source.origin is not None
        self._begun: _Begun | None = None
        self.cache = cache
        self.past = cache_argument(source.module)
        self.infos = module_infos(source.module)
        self.tensors = tensor_infos(source.module)
        self.names = tensor_names(source.module)
        self.blocks = block_paths(source.module)
        self.library = Library()
        self.constants: dict[str, torch.Tensor] = {}
        self._likely: tuple[str, ...] | None = None  # what the next capture fills in, probably
        self._made: dict[Key, list[Capture]] = {}

    @property
    def first(self) -> Capture:
        """The capture that was made first: the one that rules are applied to."""
        return next(iter(self._made.values()))[0]

    def find(self, call: Call, training: bool, casts: Casts = frozenset()) -> Capture:
        """The capture that serves a call, made now if there is none yet.

        A call that has one waits for nothing. Raises PSG203 for a call without a tensor, and what
        :func:`export` raises.
        """
        if not call.tensors:
            raise SurgeryError("PSG203", f"{self.infos[''].type} was called without a tensor")
        key = (call.signature, casts, surroundings())

        def make() -> Capture:
            told = told_of(self.source.module) if self.shared and not self._made else None
            made = None if told is None else self._taken_over(told, key, call, training)
            if made is None:
                state = key[-1]
                with uncollected():
                    made = outside(lambda: self._make(call, training, casts, state), state)
            self._made[key] = [*self._made.get(key, ()), made]
            if told is not None:
                self._begin(told, key, made)
            return made

        return known_or_made(lambda: self._known(key, call, training), make)

    def _known(self, key: Key, call: Call, training: bool) -> Capture | None:
        known = (c for c in self._made.get(key, ()) if c.fits(call.leaves, training))
        return next(known, None)

    def _taken_over(self, told: Told, key: Key, call: Call, training: bool) -> Capture | None:
        """The first capture of a model like this one, if it is of this call."""
        other = _LATEST.get(str(self.source.origin))
        begun = None if other is None else other._begun
        if begun is None or begun.key != key or not begun.capture.fits(call.leaves, training):
            return None
        if not begun.told.agrees(told):
            return None
        self.library = begun.library.copy()
        self.constants, self._likely = dict(begun.constants), begun.likely
        return begun.capture

    def _begin(self, told: Told, key: Key, capture: Capture) -> None:
        """Note what the first capture was made of, for the next model like this one."""
        beside = self.library.copy(), dict(self.constants), self._likely
        self._begun = _Begun(told, key, capture, *beside)
        place = str(self.source.origin)
        latest = _LATEST.get(place)
        if latest is None or latest._begun is None or latest._begun.capture is not capture:
            _LATEST[place] = self

    def _make(self, call: Call, training: bool, casts: Casts, state: Surroundings) -> Capture:
        """Make a capture for a call, with dynamic batch size and past length where possible."""
        module = self._module(casts)
        parameters = list(module.parameters())
        call = map_tensors(call, lambda tensor: _tangible(tensor, parameters))
        capture = self._capture(module, widen(call), training, state)
        if not capture.fits(call.leaves, training):
            capture = self._capture(module, call, training, state)
        return capture

    def _module(self, casts: Casts) -> nn.Module:
        """The module to export: the source's own, or one of its structure in the wanted dtypes."""
        wanted = {name: info.dtype for name, info in self.tensors.items()} | dict(casts)
        return traceable(self.source.module, wanted)

    def _capture(
        self, module: nn.Module, call: Call, training: bool, state: Surroundings
    ) -> Capture:
        if self._likely is None:
            parts = dict(named_parts(module, remove_duplicate=False))
            self._likely = told_by_number({path: parts[path] for path in sorted(self.blocks)})
        with traced_alone(), noted_calls(module) as notes:
            exported = export(module, call, training, notes, likely=self._likely)
        self._likely = _after_another(exported.filled)
        tensors = tensor_infos(module)
        self._name_constants(exported.module)
        of_module = _counters(module), _dropouts(module)
        clean_up(exported.module, self.names, *of_module, exported.mode)
        check_writes(exported.module.graph, tensors, self.infos[""].type)
        splitter = Splitter(self.blocks, self.infos, tensors, self.library)
        splitter.split(exported.module.graph)
        return Capture(
            without_idle_masks(splitter.programs),
            exported.output,
            tuple(node.name for node in exported.module.graph.find_nodes(op="placeholder")),
            exported.conditions,
            exported.mode,
            example(call),
            state,
            notes.done(),
            exported.decisions,
        )

    def _name_constants(self, module: fx.GraphModule) -> None:
        """Give each constant tensor of a capture a name that no other capture uses."""
        for node in module.graph.find_nodes(op="get_attr"):
            if str(node.target) in self.tensors:
                continue
            value = getattr(*owner_of(module, str(node.target)), None)
            if not isinstance(value, torch.Tensor):
                continue
            name = f"_constant_{len(self.constants)}"
            self.constants[name] = value.detach()
            node.target = name


def _after_another(filled: Sequence[str]) -> tuple[str, ...]:
    """Those of the blocks that come after another of them in their list.

    The one before may be the second of its kind, which other arguments may have traced.
    """
    known = set(filled)
    places = [(path, *path.rpartition(".")) for path in filled]
    return tuple(
        path
        for path, home, dot, number in places
        if number.isdecimal() and f"{home}{dot}{int(number) - 1}" in known
    )


def _counters(module: nn.Module) -> frozenset[str]:
    """The names of the buffers in which batch norms count the batches they saw."""
    return frozenset(
        f"{name}.num_batches_tracked" if name else "num_batches_tracked"
        for name, part in named_parts(module)
        if isinstance(part, nn.modules.batchnorm._NormBase)
    )


def _dropouts(module: nn.Module) -> frozenset[str]:
    """The paths of the dropouts that are modules."""
    return frozenset(
        name
        for name, part in named_parts(module, remove_duplicate=False)
        if isinstance(part, nn.modules.dropout._DropoutNd)
    )


def _tangible(tensor: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Example tensor to trace a module of these parameters with, with content where there is any.

    None is to be had on meta, beside fake parameters, and of the tensors of a transform or a trace.
    """
    device = parameters[0].device if parameters and tensor.is_meta else tensor.device
    if is_fake(parameters) or device.type == "meta":
        device = torch.device("cpu")
    elif is_plain(tensor):
        return tensor
    sizes = [size if isinstance(size, int) else size.node.hint for size in tensor.shape]
    return torch.zeros(sizes, dtype=tensor.dtype, device=device)
