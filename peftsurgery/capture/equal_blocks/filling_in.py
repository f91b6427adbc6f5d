"""One node for the call of a block that is equal to one traced before.

While a model is traced, the nodes that one call of a block made are a passage of the graph. Where
an equal block is called, one node stands for a copy of them: it takes the other call's arguments
and the other block's tensors, and gives what the call returns. Once torch.export has done its work
on the few nodes that there are, :mod:`unfolding` puts the copies in place of these nodes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import (
    _ProxyTensor,
    disable_proxy_modes_tracing,
    get_proxy_slot,
    set_proxy_slot,
    track_tensor,
)
from torch.utils import _pytree as pytree
from transformers import Cache

from peftsurgery.capture.equal_blocks.alike import like
from peftsurgery.capture.equal_blocks.collecting import collected
from peftsurgery.capture.equal_blocks.size_questions import SYMBOLS
from peftsurgery.capture.kv_cache import Layers
from peftsurgery.capture.module_calls import GIVEN, RETURNED, Mark, ModuleCall, Notes, flatten
from peftsurgery.capture.tensors import named_tensors

_LIBRARY = torch.library.Library("peftsurgery", "FRAGMENT")
_LIBRARY.define("block(Tensor[] given, int number) -> Tensor[]")
_LIBRARY.define("block_begins(int number) -> ()")
_LIBRARY.define("block_ends(Tensor[] given, Tensor[] gives, int number) -> ()")
BLOCK = torch.ops.peftsurgery.block.default
BEGINS, ENDS = torch.ops.peftsurgery.block_begins.default, torch.ops.peftsurgery.block_ends.default

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_CONSTANTS = (*PLAIN, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class _Returned:
    """One value of a result: an argument of that number, a new tensor, or else a constant."""

    given: int | None = None
    tensor: torch.Tensor | None = None
    node: fx.Node | None = None
    constant: Any = None


@dataclass(frozen=True)
class Passage:
    """What one call of a block made: nodes, notes of its modules' calls, and its result."""

    place: Place
    nodes: Sequence[fx.Node]
    called: Mapping[str, int]
    marks: Sequence[tuple[fx.Node, str, tuple[str, int, int]]]
    calls: Mapping[str, Sequence[ModuleCall]]
    results: Sequence[_Returned]
    structure: pytree.TreeSpec
    moved: Mapping[int | str, fx.Node]  # given and own tensors that became other nodes

    @property
    def given_on(self) -> list[fx.Node]:
        """The nodes that there are of what comes after the call: each once."""
        returned = (result.node for result in self.results if result.node is not None)
        return list(dict.fromkeys((*returned, *self.moved.values())))


def layers_told_by_number(cache: Cache) -> Layers | None:
    """The layers of a cache that a call was given; None for a cache of another kind."""
    found = getattr(cache, "layers", None)  # one of an encoder and a decoder is made of two others
    return found if type(found) is Layers else None


class Place:
    """A call of a block as a trace comes to it: where in the graph it is, and what is given."""

    def __init__(
        self,
        tracer: Any,
        notes: Notes,
        block: nn.Module,
        args: Any,
        kwargs: Any,
        hidden: Sequence[str] = (),
    ) -> None:
        """``hidden`` are the names of the block's parameters, if they are out of sight."""
        self.tracer, self.notes, self.graph = tracer, notes, tracer.graph
        self.stack = {key: _entry(*entry) for key, entry in tracer.module_stack.items()}
        self.path = list(self.stack.values())[-1][0]
        self.noted_path = notes.paths.get(id(block), "")
        self.arguments = args, kwargs
        self.leaves, self.structure = flatten(self.arguments)
        self.caches = [leaf for leaf in self.leaves if isinstance(leaf, Cache)]
        known = (layers_told_by_number(cache) for cache in self.caches)
        self.layers = next((layers for layers in known if layers is not None), Layers(()))
        self.hidden = hidden
        self.tensors = dict(named_tensors(block)) if not hidden else {}
        self._first_nodes = self._nodes()
        self.last = self.graph._root.prev
        self.called = dict(tracer.num_calls)
        self.noted = dict(notes.counts)
        self.first_mark = len(notes.marks)
        self.first_collected = {key: len(values) for key, values in collected().items()}

    def node_of(self, value: Any) -> fx.Node | None:
        """The node that a tensor is, unless the trace knows its value."""
        if not isinstance(value, FakeTensor):
            return None  # an object, or a tensor within a transform
        slot: Any = get_proxy_slot(value, self.tracer, None)
        known = slot is None or slot.constant is not None
        return None if known else slot.proxy.node

    @property
    def is_plain(self) -> bool:
        """Whether every tensor is a value of the graph, and none is an argument and the block's."""
        mine = [self._first_nodes[name] for name in self.tensors]
        given = [
            self._first_nodes[index]
            for index, leaf in enumerate(self.leaves)
            if isinstance(leaf, torch.Tensor)
        ]
        told_apart = set(mine).isdisjoint(given) and len(self.caches) <= 1
        return None not in mine and None not in given and told_apart

    def passage(self, result: Any) -> Passage | None:
        """What the call made, if it is all that it did and no more than nodes."""
        nodes = list(self._made())
        more = {key: collected()[key][first:] for key, first in self.first_collected.items()}
        leaves, structure = flatten((result, more))
        inside = set(nodes)
        results = [each for leaf in leaves if (each := self._result(leaf, inside)) is not None]
        now = self._nodes().items()
        moved = {key: n for key, n in now if n in inside and n is not self._first_nodes[key]}
        is_known = all(n is self._first_nodes[key] or key in moved for key, n in now)
        calls = self._new_calls()
        if (
            len(results) < len(leaves)
            or not self._has_same_arguments()
            or not is_known
            or not self._are_copyable(nodes)
            or not self._are_apart([r.tensor for r in results if r.tensor is not None])
            or calls is None
        ):
            return None
        called = {
            path: count - self.called.get(path, 0)
            for path, count in self.tracer.num_calls.items()
            if count > self.called.get(path, 0)
        }
        marks = tuple(self.notes.marks[self.first_mark :])
        return Passage(self, nodes, called, marks, calls, results, structure, moved)

    def _new_calls(self) -> dict[str, list[ModuleCall]] | None:
        """The calls of modules within this one; None if one of them did not end."""
        made = {path: c[self.noted.get(path, 0) :] for path, c in self.notes.calls.items()}
        ended = {path: [call for call in c if call is not None] for path, c in made.items() if c}
        return ended if all(len(c) == len(made[path]) for path, c in ended.items()) else None

    def _made(self) -> Iterator[fx.Node]:
        node = self.last.next
        while node is not self.graph._root:
            yield node
            node = node.next

    def _has_same_arguments(self) -> bool:
        """Whether the arguments hold the very things that they held."""
        leaves, structure = flatten(self.arguments)
        return (
            structure == self.structure
            and len(leaves) == len(self.leaves)
            and all(new is old for new, old in zip(leaves, self.leaves, strict=True))
        )

    def _nodes(self) -> dict[int | str, fx.Node | None]:
        """The nodes that the arguments and the block's tensors are now."""
        nodes: dict[int | str, fx.Node | None] = {}
        nodes |= {index: self.node_of(leaf) for index, leaf in enumerate(self.leaves)}
        return nodes | {name: self.node_of(tensor) for name, tensor in self.tensors.items()}

    def _are_copyable(self, nodes: Sequence[fx.Node]) -> bool:
        """Whether nodes call functions of one another, of what is given, and of constants."""
        known = {*nodes, *self._first_nodes.values()}
        return all(
            node.op == "call_function"
            and all(
                value in known or isinstance(value.meta.get("val"), SYMBOLS)
                if isinstance(value, fx.Node)
                else isinstance(value, _CONSTANTS)
                for value in _values((node.args, node.kwargs))
            )
            for node in nodes
        )

    def _are_apart(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether tensors share no memory with one another, nor with what was there before."""
        there = [each for each in self.leaves if isinstance(each, torch.Tensor)]
        before = {memory(tensor) for tensor in (*there, *self.tensors.values())}
        made = [memory(tensor) for tensor in {id(each): each for each in tensors}.values()]
        return len(set(made)) == len(made) and before.isdisjoint(made)

    def _result(self, leaf: Any, inside: set[fx.Node]) -> _Returned | None:
        given = next((i for i, value in enumerate(self.leaves) if value is leaf), None)
        if isinstance(leaf, (*PLAIN, *SYMBOLS)):
            return _Returned(constant=leaf)
        if given is not None:
            return _Returned(given=given)
        node = self.node_of(leaf)
        if node is None or node not in inside or type(leaf) is not FakeTensor:
            return None
        return _Returned(tensor=leaf, node=node)

    def fill_in(self, passage: Passage, number: int) -> tuple[Any] | None:
        """The result of this call if it does what a passage does, in a tuple; None if it cannot be.

        One node stands for what it does, of that ``number``.
        """
        value_of: dict[fx.Node, fx.Node] = {}
        taken = passage.place.given
        if self.hidden:
            taken, own = taken[: len(self.given)], taken[len(self.given) :]
            if not self._are_named(own, passage):
                return None
        for old, new in zip(taken, self.given, strict=True):
            if value_of.setdefault(old, new) is not new:
                return None
        # the sizes of what is made here are computed beside the trace
        with torch._C.DisableTorchFunction(), disable_proxy_modes_tracing():
            made = _all_like(passage)
            if made is None:
                return None
            self._stand_in(passage, number, value_of, made)
        leaves = [self._value(result, made) for result in passage.results]
        returned, more = pytree.tree_unflatten(leaves, passage.structure)
        for key, values in collected().items():
            values.extend(more[key])
        return (returned,)

    def _stand_in(
        self,
        passage: Passage,
        number: int,
        value_of: dict[fx.Node, fx.Node],
        made: Mapping[fx.Node, torch.Tensor],
    ) -> None:
        """Add the node that stands for what this call does, and tie to it what it ``made``."""
        call = self._append(
            BLOCK, (self.given, number), passage.nodes[-1] if passage.nodes else None
        )
        call.meta["val"] = [node.meta.get("val") for node in passage.given_on]
        for index, node in enumerate(passage.given_on):
            value_of[node] = self._append(operator.getitem, (call, index), node)
        self._note(passage, value_of)
        for key, node in passage.moved.items():
            given = self.leaves[key] if isinstance(key, int) else self.tensors[key]
            slot = _ProxyTensor(fx.Proxy(value_of[node], self.tracer), None)
            set_proxy_slot(given, self.tracer, slot)
        for node, tensor in made.items():  # its sizes have nodes once something asks for them
            proxy = fx.Proxy(value_of[node], self.tracer)
            track_tensor(tensor, proxy, constant=None, tracer=self.tracer)

    def _are_named(self, own: Sequence[fx.Node], passage: Passage) -> bool:
        """Whether a copy of a passage can read this block's parameters by their names."""
        return (
            list(passage.place.tensors) == list(self.hidden)
            and len(own) == len(self.hidden)
            and all(node.op == "placeholder" for node in own)
            and not any(isinstance(key, str) for key in passage.moved)
            and {node for node, _, _ in passage.marks}.isdisjoint(own)
        )

    @property
    def given(self) -> list[fx.Node]:
        """The nodes of the tensors among the arguments, and of the block's own."""
        return [node for node in self._first_nodes.values() if node is not None]

    def enclose(self, passage: Passage, number: int) -> None:
        """Put a node before those of a passage that this call made, and one behind them."""
        if self.last.op != "placeholder":  # or else all that comes before its end is the passage's
            with self.graph.inserting_before(self.last.next):
                self._append(BEGINS, (number,), None)
        self._append(ENDS, (self.given, passage.given_on, number), None)

    def _append(self, target: Any, args: tuple[Any, ...], like: fx.Node | None) -> fx.Node:
        made = self.graph.create_node("call_function", target, args)
        meta = {} if like is None else like.meta
        made.meta = {key: value for key, value in meta.items() if key not in (GIVEN, RETURNED)}
        made.meta["nn_module_stack"] = dict(self.stack)
        return made

    def _value(self, result: _Returned, made: Mapping[fx.Node, torch.Tensor]) -> Any:
        if result.node is not None:
            return made[result.node]
        return result.constant if result.given is None else self.leaves[result.given]

    def _note(self, passage: Passage, value_of: Mapping[fx.Node, fx.Node]) -> None:
        """Note the calls of the modules in the block, as if they had been made.

        Nodes that there are say so now, the others when they are there.
        """
        first, inside = passage.place, set(passage.nodes)
        for path, count in passage.called.items():
            there = beneath(path, first.path, self.path)
            self.tracer.num_calls[there] = self.called.get(there, 0) + count
        for path, calls in passage.calls.items():
            there = beneath(path, first.noted_path, self.noted_path)
            self.notes.add(there, calls)
        for node, key, mark in passage.marks:
            if node in value_of or node not in inside:
                self.notes.mark_node(value_of.get(node, node), key, self.moved(passage, mark))

    def moved(self, passage: Passage, mark: Mark) -> Mark:
        """What a value of a call within a passage is here."""
        first, (path, number, index) = passage.place, mark
        there = beneath(path, first.noted_path, self.noted_path)
        return there, number - first.noted.get(path, 0) + self.noted.get(there, 0), index


def _entry(path: str, kind: Any) -> tuple[str, str]:
    return path, f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else kind


def beneath(path: str, old: str, new: str) -> str:
    """A path beneath ``old`` (or that itself) as one beneath ``new``."""
    return new + path.removeprefix(old) if path == old or path.startswith(f"{old}.") else path


def _values(argument: Any) -> Iterator[Any]:
    if isinstance(argument, list | tuple):
        for each in argument:
            yield from _values(each)
    elif isinstance(argument, dict):
        for each in argument.values():
            yield from _values(each)
    elif isinstance(argument, slice):
        yield from (argument.start, argument.stop, argument.step)
    else:
        yield argument


def memory(tensor: torch.Tensor) -> int:
    """What a tensor and its views have in common."""
    return int(tensor.untyped_storage()._cdata)


def _all_like(passage: Passage) -> dict[fx.Node, torch.Tensor] | None:
    """For the nodes that a passage's results are new tensors like those; None if one cannot be."""
    made: dict[fx.Node, torch.Tensor] = {}
    for result in passage.results:
        if result.tensor is not None and result.node is not None and result.node not in made:
            tensor = like(result.tensor)
            if tensor is None:
                return None
            made[result.node] = tensor
    return made
