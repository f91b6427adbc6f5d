"""Caches: what a model remembers from one call to the next is the caller's object, left opaque.

A capture never looks into a cache. While a model is traced, the cache's layers have stand-ins that
answer questions about lengths with symbols, and an operator of our own stands where new keys and
values are handed over. In the captured graph the cache is an input like any other: its lengths are
asked, and its ``update`` is called, when the graph runs. So every cache of keys and values works
(windows that slide, quantised, offloaded and static layers), the caller's own object is the one
that grows, and one capture serves all tokens after the first.
"""

from __future__ import annotations

import contextlib
import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from transformers import Cache, EncoderDecoderCache, PreTrainedModel, masking_utils
from transformers.cache_utils import CacheLayerMixin
from transformers.exporters.utils import patch_attribute
from transformers.integrations import sdpa_attention

from peftsurgery.capture import ops
from peftsurgery.capture.stack import inherit
from peftsurgery.capture.tensors import number_or_self
from peftsurgery.capture.withheld import names_of, refused

# The lengths of a layer, as conditions ask for them: the tokens it saw, how many of them are still
# attended to, and how many came before those.
LENGTHS = ("get_seq_length({})", "get_mask_sizes(0, {})[0]", "get_mask_sizes(0, {})[1]")
# By how much a trace takes a past for longer, since what holds for 0 and 1 only is not general, and
# how much of that is before what is attended to, if something is.
STRETCH, BEFORE = 23, 10


@dataclass(frozen=True)
class Past:
    """A cache as the argument ``name`` of a call; layers of one kind have equal lengths.

    ``stretched`` is whether a trace is to take it for longer than it is.
    """

    name: str
    cache: Cache
    stretched: bool = False

    @cached_property
    def signature(self) -> Any:
        """Hashable identity of the cache: kinds of its layers, and of those it would add."""
        kinds = [_kind(layer) for layer in self.cache.layers]
        if self.cache.layer_class_to_replicate is not None:
            kinds.append(_kind(self.cache.layer_class_to_replicate()))
        return self.name, type(self.cache), kinds if len(set(kinds)) > 1 else kinds[:1]

    @property
    def seen(self) -> int:
        """Number of tokens that the cache is taken to hold.

        Raises PSG210 if it does not count them.
        """
        layers = self.cache.layers
        if layers and not any(isinstance(layer, CacheLayerMixin) for layer in layers):
            raise refused(f"a {type(layers[0]).__name__} remembers no keys and values")
        return int(self.cache.get_seq_length()) + (STRETCH if self.stretched else 0)

    def emptied(self) -> Past:
        """A cache of this kind with nothing in it."""
        cache = copy.copy(self.cache)
        cache.layers = [_emptied(layer) for layer in self.cache.layers]
        return Past(self.name, cache)


def _kind(layer: Any) -> Any:
    return type(layer), layer.get_max_length()


def _emptied(layer: Any) -> Any:
    """A layer of the same kind with nothing in it; resetting it must not touch what it shares."""
    made = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            setattr(made, name, value.clone() if value.dim() == 0 else None)
    made.is_initialized = False
    made.reset()
    return made


@torch.library.custom_op("peftsurgery::remember", mutates_args=())
def _remember(
    keys: Tensor, values: Tensor, layer: int, length: int, withheld: str
) -> tuple[Tensor, Tensor]:
    """Placeholder operator for a cache update in a trace.

    New keys and values in, all of them out.
    """
    raise NotImplementedError("this operator is replaced before a capture runs")


@_remember.register_fake
def _(
    keys: Tensor, values: Tensor, layer: int, length: int, withheld: str
) -> tuple[Tensor, Tensor]:
    def longer(new: Tensor) -> Tensor:
        return new.new_empty((*new.shape[:-2], length, new.shape[-1]))

    return longer(keys), longer(values)


REMEMBER = torch.ops.peftsurgery.remember.default


class Traced:
    """One cache during one trace: a copy whose layers are stand-ins, and where it was returned.

    ``sizes`` are tensors without content, one for each kind of layer, under names that no argument
    has: their sizes are the lengths of that kind. A length of 0 or 1 is fixed, a case of its own.
    """

    def __init__(self, past: Past, module: nn.Module, text: str, new: int) -> None:
        """``new`` tokens follow the past, given by the argument ``text``."""
        self.past = past
        self.text, self.new = f"{text}.shape[1]", new
        self.returned: int | None = None
        self.layers = _all_layers(past.cache, module)
        self.lengths: dict[int, tuple[int, int, int]] = {}
        self.first: dict[Any, int] = {}  # the first layer of every kind
        for index, layer in enumerate(self.layers):
            _check(layer)
            if isinstance(layer, CacheLayerMixin):
                self.first.setdefault(_kind(layer), index)
        for index in self.first.values():
            if not self.layers[index].is_compileable:
                self.lengths[index] = _lengths(self.layers[index], past.stretched)
        self.sizes = {
            f"past_lengths_{index}": torch.zeros(()).expand([n for n in lengths if n > 1])
            for index, lengths in self.lengths.items()
        }

    def run(self, forward: Callable[..., Any], tensors: dict[str, Tensor], **flags: Any) -> Any:
        """What ``forward`` returns for a stand-in of the cache, with 0 where it returns the cache.

        ``tensors`` have the sizes among them.
        """
        symbols = {
            index: self._symbols(index, tensors.pop(f"past_lengths_{index}"))
            for index in self.lengths
        }
        cache = copy.copy(self.past.cache)
        cache.layer_class_to_replicate = None
        cache.layers = Layers([self._stand_in(i, symbols) for i in range(len(self.layers))])
        outputs = forward(**tensors, **{self.past.name: cache}, **flags)
        leaves, spec = pytree.tree_flatten(outputs, is_leaf=lambda value: value is cache)
        numbers = [number for number, leaf in enumerate(leaves) if leaf is cache]
        self.returned = numbers[0] if numbers else None
        return pytree.tree_unflatten([0 if leaf is cache else leaf for leaf in leaves], spec)

    def _stand_in(self, index: int, symbols: Mapping[int, tuple[int, int, int]]) -> Any:
        layer = self.layers[index]
        first = self.first.get(_kind(layer))
        if first is None:
            return layer
        if first in symbols:
            return _stand_in(_Growing, layer, index, symbols[first])
        return _stand_in(_Fixed, layer, index, self._fixed(first))

    def _fixed(self, index: int) -> tuple[int, int, int]:
        """Seen, attended and other lengths of a layer kind that does not grow, as numbers."""
        layer = self.layers[index]
        return (int(layer.get_seq_length()), *layer.get_mask_sizes(self.new))

    def _symbols(self, index: int, sizes: Tensor) -> tuple[int, int, int]:
        """Seen, attended and other lengths of a layer kind, as the trace's symbols."""
        free = iter(sizes.shape)
        seen, within, before = (n if n < 2 else next(free) for n in self.lengths[index])
        return seen, within, before

    def _free(self, index: int) -> list[int]:
        """Which of the three lengths are free sizes of the stand-in tensor."""
        return [which for which, n in enumerate(self.lengths[index]) if n > 1]

    def conditions(self, texts: tuple[str, ...]) -> tuple[str, ...]:
        """Conditions on the sizes as conditions on the cache, and those on what was fixed."""
        fixed: list[str] = []
        for index in self.first.values() - self.lengths.keys():
            seen, within, _ = self._fixed(index)
            fixed.append(f"{self.past.name}.get_mask_sizes({self.text}, {index})[0] == {within}")
            if not seen:
                fixed.append(f"{self.past.name}.get_seq_length({index}) == 0")
        for index, lengths in self.lengths.items():
            asked = [f"{self.past.name}.{length.format(index)}" for length in LENGTHS]
            fixed += [f"{asked[which]} == {n}" for which, n in enumerate(lengths) if n < 2]
            for axis, which in enumerate(self._free(index)):
                size = f"past_lengths_{index}.shape[{axis}]"
                texts = tuple(text.replace(size, asked[which]) for text in texts)
        return (*fixed, *texts)

    def connect(self, graph: fx.Graph) -> None:
        """Make the cache an input of the traced graph, in place of everything that stood for it."""
        placeholders = graph.find_nodes(op="placeholder")
        with graph.inserting_before(placeholders[-1].next):
            cache = graph.placeholder(self.past.name)
        for index in self.lengths:
            sizes = next(node for node in placeholders if node.name == f"past_lengths_{index}")
            _ask(graph, sizes, cache, index, self._free(index))
        for node in graph.find_nodes(op="call_function", target=REMEMBER):
            _hand_over(graph, node, cache)
        if self.returned is not None:
            output = graph.output_node()
            values = list(cast("tuple[Any, ...]", output.args[0]))
            values[self.returned] = cache
            output.args = (tuple(values),)


@contextlib.contextmanager
def as_if_run() -> Iterator[None]:
    """Let transformers take the shortcuts of decoding, which it leaves out of what it exports.

    Heads that share keys are packed for a single token, and a mask that masks nothing is not made.
    Both decide by sizes, so they become conditions of the capture. (A condition may be left
    standing where a core wants a truth value.)
    """

    def decided(core: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, is_causal: bool = False, **named: Any) -> Tensor:
            return core(*args, is_causal=bool(is_causal), **named)

        return run

    with (
        patch_attribute(nn.functional, "scaled_dot_product_attention", decided),
        patch_attribute(sdpa_attention, "is_torchdynamo_compiling", lambda _: lambda: False),
        patch_attribute(masking_utils, "is_torchdynamo_exporting", lambda _: lambda: False),
    ):
        yield


class Layers(Sequence[Any]):
    """The layers of a cache in a trace; ``asked`` are the numbers of those that were asked for."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.every = tuple(layers)
        self.asked: list[Any] = []

    def __len__(self) -> int:
        return len(self.every)

    def __getitem__(self, index: Any) -> Any:
        self.asked.append(index if isinstance(index, int) else None)
        return self.every[index]

    def kept_by(self, number: int) -> dict[str, Any]:
        """What a layer keeps, its number and the content of the one it stands for aside."""
        aside = ("index", "keys", "values")
        return {key: v for key, v in vars(self.every[number]).items() if key not in aside}

    def told_of(self, number: int) -> dict[str, Any]:
        """The same, with numbers in place of tensors that are one (the length of a window)."""
        return {key: number_or_self(value) for key, value in self.kept_by(number).items()}


class _StandIn:
    """A layer of a cache in a trace: it has lengths and no content."""

    _layer_type = None  # transformers registers layers that name a type
    is_sliding: bool
    index: int
    lengths: tuple[int, int, int]
    added: int

    def update(self, keys: Tensor, values: Tensor, *more: Any, **named: Any) -> Any:
        """Append keys and values, and return all of them; other arguments are withheld."""
        withheld = names_of(more, named)
        length, _ = self.get_mask_sizes(keys.shape[-2])
        self.added += keys.shape[-2]
        return torch.ops.peftsurgery.remember(keys, values, self.index, length, withheld)

    @abstractmethod
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(attended length, offset of the first key) for a query of so many new tokens."""

    @property
    def keys(self) -> Tensor:
        """Raise PSG210: a traced layer has no content to read."""
        raise refused("it reads keys and values out of its cache by itself")

    values = keys


class _Growing(_StandIn):
    """A layer that is longer by what it is given."""

    def get_seq_length(self) -> int:
        """The tokens seen up to now."""
        return self.lengths[0] + self.added

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.added and self.is_sliding:
            raise refused("it asks a sliding window for its length after filling it")
        return self.lengths[1] + self.added + query_length, self.lengths[2]


class _Fixed(_StandIn):
    """A layer of a fixed length. Masks are made for it beforehand, unless it is empty."""

    def get_seq_length(self) -> int:
        """0: a fixed layer counts no tokens."""
        if self.lengths[0] or self.added:
            raise refused("it asks a cache of fixed length how long it is")
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.lengths[1], self.lengths[2]


def is_cache(value: Any) -> bool:
    """Whether an argument is a cache that a capture can leave to its owner."""
    return isinstance(value, Cache) and not isinstance(value, EncoderDecoderCache)


def _stand_in(by: type[_StandIn], layer: Any, index: int, lengths: tuple[int, int, int]) -> Any:
    kind = type(type(layer).__name__, (by, type(layer)), {})
    made: Any = object.__new__(kind)
    made.__dict__.update(vars(layer))
    made.index, made.lengths, made.added = index, lengths, 0
    return made


def _all_layers(cache: Cache, module: nn.Module) -> list[Any]:
    """The layers of a cache with those that it would add for this model."""
    layers = list(cache.layers)
    if cache.layer_class_to_replicate is not None and isinstance(module, PreTrainedModel):
        wanted = module.config.get_text_config(decoder=True).num_hidden_layers
        layers += [cache.layer_class_to_replicate() for _ in range(wanted - len(layers))]
    return layers


def _check(layer: Any) -> None:
    """Refuse a layer that is more than keys and values, or other than that. PSG210."""
    if any(name.startswith("update_") for name in dir(layer)):
        raise refused(f"a {type(layer).__name__} remembers more than keys and values")


def _lengths(layer: Any, stretched: bool) -> tuple[int, int, int]:
    """The lengths of a layer that grows, as a trace is to take them."""
    within, before = layer.get_mask_sizes(0)
    if layer.get_mask_sizes(1) != (within + 1, before):
        raise refused(f"a {type(layer).__name__} does not grow by what it is given")
    seen = layer.get_seq_length()
    if not stretched:
        return seen, within, before
    longer = BEFORE if before else 0
    return seen + STRETCH, within + STRETCH - longer, before + longer


def _ask(graph: fx.Graph, sizes: fx.Node, cache: fx.Node, index: int, free: Sequence[int]) -> None:
    """Ask the cache for what the trace read off ``sizes``, a stand-in for a kind of layer."""
    for size in list(sizes.users):
        assert size.target is torch.ops.aten.sym_size.int
        which = free[cast("int", size.args[1])]
        with graph.inserting_before(cache.next):
            asked = graph.call_function(ops.past_length, (cache, index, which))
        asked.meta["val"] = size.meta["val"]
        size.replace_all_uses_with(asked)
        graph.erase_node(size)
    graph.erase_node(sizes)


def _hand_over(graph: fx.Graph, node: fx.Node, cache: fx.Node) -> None:
    """Call the cache where the trace called the operator that stood for it.

    Which layer of the cache it is, is said outside of the blocks: they stay alike.
    """
    keys, values, index, _, withheld = node.args
    with graph.inserting_before(cache.next):
        layer = graph.call_function(ops.layer_of, (cache, index))
    with graph.inserting_before(node):
        both = graph.call_function(ops.remember, (layer, keys, values, withheld))
    inherit(both, node)
    for pick in list(node.users):
        number = cast("int", pick.args[1])
        with graph.inserting_before(pick):
            longer = graph.call_function(ops.with_past, ((keys, values)[number], both, number))
        longer.meta.update(pick.meta)
        inherit(longer, node)
        pick.replace_all_uses_with(longer)
        graph.erase_node(pick)
    graph.erase_node(node)
