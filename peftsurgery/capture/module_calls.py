"""How the original calls its modules: what each call is given and what it returns.

While a model is traced, every call of a module is noted: the structure of its arguments and of its
result, what in them is no tensor, and which nodes of the graph are the tensors. A node says of
itself which argument of which calls it is (``meta["given"]``), and which result
(``meta["returned"]``); clean-up and rewriting hand that on where a node takes another's place. So a
part of the graph can be made a call of the module it came from at any time later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.utils import _pytree as pytree
from transformers import Cache

from peftsurgery.capture.parts import named_parts

GIVEN, RETURNED = "given", "returned"
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Leaf:
    """One value of a call: a node of the graph, the model's cache, or a constant.

    An ``opaque`` one is an object that may differ in another call: of it only the name of its type
    is kept, so that nothing of the example lives on.
    """

    kind: str
    constant: Any = None


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module: the structure and the values of its args and kwargs, and its result."""

    arguments: pytree.TreeSpec
    given: tuple[Leaf, ...]
    result: pytree.TreeSpec
    returned: tuple[Leaf, ...]

    @property
    def is_opaque(self) -> bool:
        """Whether an argument or a result is an object that no graph has."""
        return any(leaf.kind == "opaque" for leaf in (*self.given, *self.returned))


ModuleCalls = Mapping[str, Sequence[ModuleCall]]
# One value of one call: the module's path, the call's number among its calls, the value's number.
Mark = tuple[str, int, int]


class Notes:
    """What was noted in the latest trace: a trace that begins replaces it."""

    def __init__(self, module: nn.Module) -> None:
        self.paths = {id(part): name for name, part in named_parts(module) if name}
        self.tracer: Any = None
        self.marks: list[tuple[fx.Node, str, Mark]] = []
        self.calls: dict[str, list[ModuleCall | None]] = {}
        self.counts: dict[str, int] = {}  # of the calls of each part
        self.running: list[tuple[str, int, tuple[Leaf, ...], pytree.TreeSpec] | None] = []

    def begin(self, tracer: Any) -> None:
        """Forget what was noted in another trace."""
        if self.tracer is not tracer:
            self.tracer, self.calls, self.counts = tracer, {}, {}
            self.running, self.marks = [], []

    def enter(self, part: nn.Module, args: Any, kwargs: Any) -> None:
        """Note what a call is given, if it is traced; a copy of the part is not the part."""
        path, mode = self.paths.get(id(part)), get_proxy_mode()
        if mode is None or path is None:
            self.running.append(None)
            return
        self.begin(mode.tracer)
        number = self.counts.get(path, 0)
        self.add(path, [None])
        given, arguments = flatten((args, kwargs))
        self.mark(GIVEN, path, number, given)
        self.running.append((path, number, tuple(map(_leaf, given)), arguments))

    def add(self, path: str, calls: Sequence[ModuleCall | None]) -> None:
        """Note calls of a part, one after the other; None for one that is under way."""
        self.calls.setdefault(path, []).extend(calls)
        self.counts[path] = self.counts.get(path, 0) + len(calls)

    def leave(self, part: nn.Module, args: Any, result: Any) -> None:
        """Note what the call returns."""
        note = self.running.pop() if self.running else None
        if note is None:
            return
        path, number, given, arguments = note
        returned, structure = flatten(result)
        self.mark(RETURNED, path, number, returned)
        leaves = tuple(map(_leaf, returned))
        self.calls[path][number] = ModuleCall(arguments, given, structure, leaves)

    def mark(self, key: str, path: str, number: int, leaves: Sequence[Any]) -> None:
        """Record on the trace's nodes which module call's values they are."""
        for index, leaf in enumerate(leaves):
            node = _node_of(leaf, self.tracer)
            if node is not None:
                self.mark_node(node, key, (path, number, index))

    def mark_node(self, node: fx.Node, key: str, mark: Mark) -> None:
        """Let a node say that it is a value of a call."""
        node.meta[key] = {**node.meta.get(key, {}), mark: None}
        self.marks.append((node, key, mark))

    def done(self) -> ModuleCalls:
        """The calls that came to an end, by path."""
        return {
            path: tuple(call for call in calls if call is not None)
            for path, calls in self.calls.items()
            if None not in calls
        }


@contextmanager
def noted_calls(module: nn.Module) -> Iterator[Notes]:
    """Note every call of the module's parts while it is traced."""
    notes = Notes(module)
    handles = []
    for name, part in named_parts(module):
        if name:  # by torch's own functions: a captured model's parts have theirs
            enter = nn.Module.register_forward_pre_hook(part, notes.enter, with_kwargs=True)
            leave = nn.Module.register_forward_hook(part, notes.leave, prepend=True)
            handles += [enter, leave]
    try:
        yield notes
    finally:
        for handle in handles:
            handle.remove()


def flatten(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of a call's values, and their structure; a cache is one of the leaves."""
    return pytree.tree_flatten(value, is_leaf=lambda item: isinstance(item, Cache))


def hand_on(old: fx.Node, new: fx.Node, keys: Sequence[str] = (GIVEN, RETURNED)) -> None:
    """Copy a node's module-call records to another node."""
    for key in keys:
        if key in old.meta:
            new.meta[key] = {**new.meta.get(key, {}), **old.meta[key]}


def take_place(old: fx.Node, new: fx.Node, keys: Sequence[str] = (GIVEN, RETURNED)) -> None:
    """Move a node's module-call records to another node."""
    hand_on(old, new, keys)
    for key in keys:
        old.meta.pop(key, None)


def _leaf(value: Any) -> Leaf:
    if isinstance(value, torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
        return Leaf("node")
    if isinstance(value, Cache):
        return Leaf("cache")
    if isinstance(value, _PLAIN):
        return Leaf("constant", value)
    return Leaf("opaque", type(value).__name__)


def _node_of(value: Any, tracer: Any) -> fx.Node | None:
    """The graph node behind a traced value; None for a constant."""
    if isinstance(value, torch.Tensor):
        slot = get_proxy_slot(value, tracer, None)
        proxy = getattr(slot, "proxy", slot)
    elif isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        thunk: Any = get_proxy_slot(value, tracer, None)
        proxy = None if thunk is None else thunk.force()
    else:
        return None
    node = getattr(proxy, "node", None)
    return node if isinstance(node, fx.Node) else None
