"""Each distinct block is traced once; where an equal one is called, its nodes are copied.

A block (an element of a repeated list) is equal to one traced before if both are of the same
classes, have tensors of the same shapes, are given the same arguments but for other tensors of the
same shapes, and if all that the first one read has the same values in the second. What of a block's
attributes is read is watched (:mod:`attribute_reads`); what else it may read is compared as a whole
(:mod:`likeness`). A block that changed something, or of which any of this cannot be told, is
traced by itself, and so is every block like it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch.fx.experimental import proxy_tensor
from torch.nn.modules import module as torch_modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import Cache

from peftsurgery.capture.blocks import block_paths
from peftsurgery.capture.equal_blocks.alike import kind, sizes
from peftsurgery.capture.equal_blocks.attribute_reads import noted_attributes, watchable
from peftsurgery.capture.equal_blocks.collecting import (
    is_collecting,
    told_of_collected,
    told_of_hooks,
)
from peftsurgery.capture.equal_blocks.filling_in import (
    Passage,
    Place,
    layers_told_by_number,
    memory,
)
from peftsurgery.capture.equal_blocks.likeness import Token, TokenMaker
from peftsurgery.capture.equal_blocks.out_of_sight import Hidden, OutOfSightError
from peftsurgery.capture.equal_blocks.situations import (
    Attribute,
    Situation,
    number_tensors,
    told_apart,
    told_beside,
    told_of_attributes,
    told_of_tensors,
)
from peftsurgery.capture.equal_blocks.size_questions import Questions
from peftsurgery.capture.equal_blocks.unfolding import Filling
from peftsurgery.capture.kv_cache import Layers
from peftsurgery.capture.masks import Masks
from peftsurgery.capture.modes import called_with
from peftsurgery.capture.module_calls import Notes
from peftsurgery.capture.parts import named_parts
from peftsurgery.capture.randomness import drawn_elsewhere
from peftsurgery.capture.surroundings import surroundings
from peftsurgery.capture.watched import HOOKS

_TRACER = "_ModuleStackTracer"
_GLOBAL_HOOKS = tuple(
    name
    for name in vars(torch_modules)
    if name.startswith("_global_") and name.endswith("_hooks") and "registration" not in name
)


@dataclass
class _BlockCall:
    """A call of a block that is being traced, and what it has read up to now."""

    names: dict[int, str]  # of its parts, by the identity of their dictionaries
    questions: Questions
    layers: Layers  # of the cache that is given
    read: set[Attribute] = field(default_factory=set)
    numbers: set[Attribute] = field(default_factory=set)  # read as the number of a cache's layer
    stood_for: list[fx.Node] = field(default_factory=list)  # nodes that others in it stand for
    is_open: bool = False  # whether it read of another module what tells blocks apart


@dataclass(frozen=True)
class _Known:
    situation: Situation
    unread: set[Attribute]
    running: _BlockCall
    passage: Passage
    number: int  # of the passage
    layers: dict[Attribute, Token]  # the cache's that are told by number, as they were before
    kept: dict[str, Any]  # what that one keeps afterwards


class Once:
    """The blocks of one trace; ``fillings`` are the calls of those that were not traced."""

    def __init__(
        self, module: nn.Module, notes: Notes, masks: Masks, likely: Collection[str] = ()
    ) -> None:
        self.notes, self.masks = notes, masks
        parts = dict(named_parts(module, remove_duplicate=False))
        blocks = {path: parts[path] for path in block_paths(module)}
        within = {path for path in blocks if any(path.startswith(f"{outer}.") for outer in blocks)}
        self.hidden = Hidden(module, set(likely) - within)
        self.blocks = {
            id(vars(block)): block
            for path, block in blocks.items()
            if _has_own_parts(block, path, notes)
        }
        self.watched = watchable(told_apart(list(self.blocks.values())))
        self.thread = threading.get_ident()
        self.tracer: Any = None
        self.known: list[_Known] = []
        self.running: list[_BlockCall] = []
        self.fillings: list[Filling] = []

    def note(self, content: dict[str, Any], name: str, frame: FrameType) -> None:
        """An attribute was used of the module with this dictionary."""
        if self.running:
            self._note(content, name, _updated(called_with(name, frame)))

    def _note(self, content: dict[str, Any], name: str, layers: Layers | None) -> None:
        """Note a use of an attribute, as the number of one of these layers if there are any."""
        for call in self.running:
            part = call.names.get(id(content))
            if part is None:
                call.is_open = True
            else:
                (call.numbers if layers is call.layers else call.read).add((part, name))

    def call(self, tracer: Any, m: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """What a module returns: traced, or as one returned that was traced before."""
        block = self.blocks.get(id(m.__dict__))
        if block is None or threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        self.tracer = self.tracer or tracer
        if tracer is not self.tracer or self._is_hooked(block):
            return forward(*args, **kwargs)
        self.notes.begin(tracer)
        with self.hidden.unguarded():
            filled = self._filled(tracer, block, args, kwargs)
        if isinstance(filled, tuple):
            return filled[0]
        if id(block) in self.hidden.parts:
            raise OutOfSightError(
                f"'{self.notes.paths[id(block)]}' is not like one that was traced"
            )
        return (
            forward(*args, **kwargs)
            if filled is None
            else filled(partial(forward, *args, **kwargs))
        )

    def _filled(self, tracer: Any, block: nn.Module, args: Any, kwargs: Any) -> Any:
        """What it returns as one did that was traced, in a tuple; else what traces it, if any."""
        hidden = self.hidden.names(block) if id(block) in self.hidden.parts else ()
        place = Place(tracer, self.notes, block, args, kwargs, hidden)
        if not place.is_plain:
            return None
        with torch._C.DisableTorchFunction():  # what is asked of tensors here is no step of theirs
            situation = self._situation(block, place)
        for known in self.known:
            if (
                situation.agrees(known.situation, known.unread)
                and all(situation.layers.get(key) == known.layers[key] for key in known.layers)
                and len(numbers := _values(block, known.layers)) <= 1
                and known.running.questions.have_same_answers()
            ):
                result = place.fill_in(known.passage, len(self.fillings))
                if result is not None:
                    layer = next(iter(numbers), None)
                    self.fillings.append(Filling(place, known.passage, known.number, layer))
                    for number in numbers:
                        vars(place.layers[number]).update(known.kept)
                    self._run_as(known, block, place)
                    return result
        return partial(self._traced, block, place, situation)

    def _run_as(self, known: _Known, block: nn.Module, place: Place) -> None:
        """Note for the blocks around that this one reads and asks what a known one did."""
        did = known.running
        for layers, attributes in ((None, did.read), (place.layers, did.numbers)):
            for part, name in attributes:
                self._note(vars(block.get_submodule(part)), name, layers)
        for call in self.running:
            call.questions.asked |= did.questions.asked
            call.stood_for += [*known.passage.nodes, *did.stood_for]

    def _traced(self, block: nn.Module, place: Place, situation: Situation, forward: Any) -> Any:
        """What a block returns, and what it did kept if it is all that it will ever do."""
        shapes = self._shapes()
        if shapes is None:
            return forward()
        names = {id(vars(part)): name for name, part in block.named_modules()}
        before, asked = self._moment(shapes), len(place.layers.asked)
        running = _BlockCall(names, Questions(shapes), place.layers)
        self.running.append(running)
        try:
            with running.questions:
                result = forward()
        finally:
            self.running.pop()
        with torch._C.DisableTorchFunction():
            passage, after = place.passage(result), self._situation(block, place)
        numbers = _values(block, running.numbers)
        if len(numbers) > 1 or not numbers.issuperset(place.layers.asked[asked:]):
            return result
        if (
            passage is None
            or running.is_open
            or self._moment(shapes) != before
            or self._is_hooked(block)
        ):
            return result
        kinds = {name: type(part) for name, part in named_parts(block, remove_duplicate=False)}
        watched = {key for key in after.attributes if (kinds[key[0]], key[1]) in self.watched}
        layers = {key: situation.layers.get(key) for key in running.numbers}
        kept = {key: v for number in numbers for key, v in place.layers.kept_by(number).items()}
        unread = watched - running.read
        known = _Known(after, unread, running, passage, len(self.known), layers, kept)
        if (
            after.agrees(replace(situation, given=after.given), known.unread)
            and running.questions.have_same_answers()
            and running.questions.are_settled([*passage.nodes, *running.stood_for])
        ):
            place.enclose(passage, known.number)
            self.known.append(known)
        return result

    def _situation(self, block: nn.Module, place: Place) -> Situation:
        tokens = TokenMaker()
        parts = named_parts(block, remove_duplicate=False)
        which: dict[int, int] = {}
        seen = [
            (
                *(name, which.setdefault(id(part), len(which)), tokens.of_class(type(part))),
                *(
                    vars(part)["training"],
                    tuple(part._modules),
                    tuple(sorted(part._non_persistent_buffers_set)),
                    told_of_hooks(part),
                ),
            )
            for name, part in parts
        ]
        tables = [self.hidden.tables[id(part)] for _, part in parts]
        own: dict[int, int] = {}
        plain = [told_of_tensors(table, own) for table in tables]
        if place.hidden:
            number_tensors(tables, which)
        tensors = None if place.hidden else [_told_of(part, which) for _, part in parts]
        around = (
            *(surroundings(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            dict(os.environ),
            told_of_collected(),
        )
        modes = (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack())
        return Situation(
            (type(block), tuple(seen)),
            tensors,
            plain,
            [sizes(leaf) for leaf in place.leaves if isinstance(leaf, torch.Tensor)],
            (place.structure, [self._told(leaf, tokens, which) for leaf in place.leaves]),
            (around, tuple(map(id, modes))),
            told_of_attributes(parts, tokens),
            self._layers(parts, place.layers, tokens),
            tokens.kept,
        )

    def _layers(
        self, parts: Sequence[tuple[str, nn.Module]], layers: Layers, tokens: TokenMaker
    ) -> dict[Attribute, Token]:
        """What each layer of the cache keeps whose number an attribute may be."""
        return {
            (name, key): (type(layers.every[value]).__bases__, tokens.of(layers.told_of(value)))
            for name, part in parts
            for key, value in vars(part).items()
            if (type(part), key) in self.watched and type(value) is int and 0 <= value < len(layers)
        }

    def _told(self, leaf: Any, tokens: TokenMaker, which: dict[int, int]) -> Token:
        """What is told of an argument: of a tensor all but its sizes and values."""
        if isinstance(leaf, Cache):
            own = {name: value for name, value in vars(leaf).items() if name != "layers"}
            is_known = layers_told_by_number(leaf) is not None
            return id(leaf), tokens.of(own), None if is_known else object()
        if not isinstance(leaf, torch.Tensor):
            return tokens.of(leaf)
        same = [which.setdefault(key, len(which)) for key in (id(leaf), memory(leaf))]
        return same, kind(leaf), self.masks.known(leaf), tokens.of(told_beside(leaf))

    def _shapes(self) -> Any:
        """What the trace knows of sizes."""
        mode = detect_fake_mode()
        return None if mode is None else mode.shape_env

    def _moment(self, shapes: Any) -> Token:
        """What a call may change beside its block and what is known of sizes."""
        unknown = shapes.unbacked_symint_counter, shapes.unbacked_symfloat_counter
        return unknown, drawn_elsewhere(), self.masks.made, len(self.notes.running), surroundings()

    def _is_hooked(self, block: nn.Module) -> bool:
        """Whether anything but our notes is called when the block or a part of it is."""
        if any(getattr(torch_modules, name) for name in _GLOBAL_HOOKS):
            return True
        return any(
            "forward" in vars(part)
            or any(
                not (getattr(hook, "__self__", None) is self.notes or is_collecting(hook))
                for hooks in HOOKS
                for hook in vars(part)[hooks].values()
            )
            for part in block.modules()
        )


def _updated(function: Any) -> Layers | None:
    """The layers of the cache whose ``update`` a function is."""
    is_update = getattr(function, "__func__", None) is Cache.update
    return layers_told_by_number(function.__self__) if is_update else None


def _told_of(part: nn.Module, which: dict[int, int]) -> Token:
    """What a trace can see of a part's own tensors."""
    return told_of_tensors(part._parameters, which), told_of_tensors(part._buffers, which)


def _values(block: nn.Module, attributes: Iterable[Attribute]) -> set[Any]:
    return {vars(block.get_submodule(part))[name] for part, name in attributes}


def _has_own_parts(block: nn.Module, path: str, notes: Notes) -> bool:
    """Whether the parts of a block are known by names beneath its own: of no other block too."""
    names = (notes.paths[id(part)] for part in block.modules())
    return all(name == path or name.startswith(f"{path}.") for name in names)


@contextmanager
def traced_once(once: Once) -> Iterator[None]:
    """Within the context torch.export fills in blocks that are equal to one it has traced."""
    outer: Any = getattr(proxy_tensor, _TRACER)

    class Tracer(outer):
        """A tracer that asks first whether a module was traced already."""

        def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
            return super().call_module(m, partial(once.call, self, m, forward), args, kwargs)

    setattr(proxy_tensor, _TRACER, Tracer)
    try:
        with noted_attributes(once.watched, once.note):
            yield
    finally:
        setattr(proxy_tensor, _TRACER, outer)
