"""Regions: stretches of a graph that can be run again with other values.

A region is run again with other values at its start. Where those have more tokens than there were,
two things in the middle would not fit: sizes that were written down (of views), and what the model
itself does to the scores (adds a bias of positions, hides some of them), which knows the old keys
only. The first are left for torch to infer. The second are padded on the left with what leaves the
new scores as they are, when they run and by as much as is missing then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx
from torch.fx.node import map_arg

from peftsurgery.anatomy.ops import Trait, has, meaning
from peftsurgery.anatomy.site import ATEN, Site
from peftsurgery.anatomy.values import sample, samples, sizes, value
from peftsurgery.capture.schemas import arguments, op
from peftsurgery.errors import SurgeryError, first_line
from peftsurgery.reach import reach
from peftsurgery.surgery.rewrite.layout import tokens_dim

GROWABLE = Trait.LAYOUT | Trait.POINTWISE | Trait.REDUCTION | Trait.ACTIVATION | Trait.DROPOUT
GROWABLE |= Trait.SOFTMAX | Trait.PRODUCT | Trait.ATTENTION
INPUTS = ("q", "k", "v", "mask")
MORE = 3  # how many more keys there are when a region is tried; any number would do

Values = Mapping[fx.Node, Any]


@dataclass(frozen=True)
class Region:
    """Nodes between some values and ``end``, in the graph's order.

    ``calls`` are the arguments of nodes whose own would not fit more tokens; ``pads`` say which
    value from outside is short of tokens at a node: beside which operand, along which dimension
    from the last, and with what it is filled.
    """

    end: fx.Node
    nodes: tuple[fx.Node, ...]
    calls: dict[fx.Node, tuple[Any, Any]] = field(default_factory=dict)
    pads: dict[tuple[fx.Node, fx.Node], tuple[fx.Node, int, int]] = field(default_factory=dict)

    def run(self, given: Values, outside: Callable[[fx.Node], Any]) -> Any:
        """Compute ``end`` from the values ``given`` for where it starts.

        ``outside`` gives the values of other nodes. Values may be tensors, fake ones or proxies.
        """
        values = dict(given)
        for node in self.nodes:
            values[node] = self.step(node, values, outside)
        return values[self.end]

    def step(self, node: fx.Node, values: Values, outside: Callable[[fx.Node], Any]) -> Any:
        """Compute one node of the region."""

        def read(source: fx.Node) -> Any:
            if source in values:
                return values[source]
            found = outside(source)
            if (node, source) in self.pads:
                beside, dim, filling = self.pads[node, source]
                found = padded(found, values[beside], dim, filling)
            return found

        target: Any = node.target
        args, kwargs = map_arg(self.calls.get(node, (node.args, node.kwargs)), read)
        return target(*args, **kwargs)


def find_region(starts: Sequence[fx.Node], end: fx.Node) -> Region:
    """Find the region between some values and a later one."""
    first = frozenset(starts)
    behind = set(reach([end], lambda node: node.all_input_nodes, first.__contains__))
    inside = dict.fromkeys(first)
    for node in end.graph.nodes:
        if node in behind and any(source in inside for source in node.all_input_nodes):
            inside[node] = None
    return Region(end, tuple(node for node in inside if node not in first))


def core_region(site: Site) -> Region:
    """Make an attention core's region, adapted to more keys. Raises PSG320 if it cannot be."""
    region = _core_nodes(site)
    tried: dict[fx.Node, Any] = {}
    for name in INPUTS:
        if name not in site.nodes:
            continue
        node, grown = site.nodes[name], list(samples(site.nodes[name]))
        if name != "q":
            dim = -1 if name == "mask" else tokens_dim(site, name)
            grown[dim] += MORE
        tried[node] = torch.empty(grown, dtype=value(node).dtype, device="meta")
    for node in region.nodes:
        longer = _grown_inputs(node, tried)
        if longer and not _grows(node) and not _keeps(node, longer):
            raise _refuse(node, "it takes tokens apart")
        _fit(region, node, longer, tried)
        _try(region, node, tried)
    if tuple(tried[region.end].shape) != samples(region.end):
        raise _refuse(region.end, "its result grows with the keys")
    if "mask" not in site.nodes and site.facts["op"] == "sdpa":
        region.calls[region.end] = _masked(region.end)
    return region


def _try(region: Region, node: fx.Node, tried: dict[fx.Node, Any]) -> None:
    try:
        tried[node] = region.step(node, tried, sample)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise _refuse(node, first_line(error)) from error


def calls_for_more(p: fx.Node, y: fx.Node, cores: Iterable[Site]) -> dict[fx.Node, Any]:
    """Refitted calls for more positions ``p``, of which y is computed, by node.

    Up to where the ``cores`` of the program, or the blocks that it calls, take what is made of
    them. PSG320 if that meets something on the way that does not become longer with it.
    """
    ends = {node for core in cores for node in _core_nodes(core).nodes}
    grown = [*samples(p)[:-1], samples(p)[-1] + MORE]
    tried: dict[fx.Node, Any] = {p: torch.empty(grown, dtype=value(p).dtype, device="meta")}
    region = Region(y, ())
    for node in p.graph.nodes:
        made = node is y or any(n in tried and n is not p for n in node.all_input_nodes)
        if not made or node.op != "call_function" or node in ends:
            continue
        _fit(region, node, _grown_inputs(node, tried), tried)
        if region.pads:
            raise _refuse(node, "biases of position join masks")
        _try(region, node, tried)
    return region.calls


def _core_nodes(site: Site) -> Region:
    starts = [node for name in INPUTS if (node := site.nodes.get(name)) is not None]
    return find_region(starts, site.nodes["o"])


def _masked(core: fx.Node) -> tuple[Any, Any]:
    """The arguments of a core that had no mask, with a stand-in for one."""
    mask = fx.Graph().placeholder("mask")
    given = ("attn_mask", "is_causal", "dropout_p")
    rest = {key: value for key, value in core.kwargs.items() if key not in given}
    return (*core.args[:3], mask, arguments(core)["dropout_p"]), rest


def padded(short: Any, beside: Any, dim: int, filling: int) -> Any:
    """``short`` with a number on the left of ``dim``, to be as long there as ``beside``."""
    more = ATEN.sym_size.int(beside, dim) - ATEN.sym_size.int(short, dim)
    return ATEN.constant_pad_nd.default(short, [0, 0] * (-dim - 1) + [more, 0], filling)


def _grown_inputs(node: fx.Node, tried: Values) -> dict[fx.Node, dict[int, tuple[int, int]]]:
    """The operands of a node that have more tokens, and where."""
    known = {n: _grown(n, tried) for n in node.all_input_nodes if n in tried}
    return {n: dims for n, dims in known.items() if dims}


def _fit(region: Region, node: fx.Node, grown: Mapping[fx.Node, Any], tried: Values) -> None:
    """Record refitted arguments and padding for a node that gets more tokens."""
    takes_sizes = len(node.args) > 1 and isinstance(node.args[1], (list, tuple))
    if grown and takes_sizes and has(node, Trait.RESHAPE | Trait.EXPANSION):
        refit = _viewed if has(node, Trait.RESHAPE) else _expanded
        wanted = refit(node, tried[node.all_input_nodes[0]])
        region.calls[node] = ((node.args[0], wanted, *node.args[2:]), node.kwargs)
    for source in node.all_input_nodes:
        short = () if source in tried else samples(source)
        for beside, dims in grown.items():
            for dim, (before, _) in dims.items():
                if len(short) >= -dim and short[dim] == before != 1 and _vary(source, beside, dim):
                    region.pads[node, source] = (beside, dim, _neutral(node, source, beside))


def _vary(source: fx.Node, beside: fx.Node, dim: int) -> bool:
    """Whether a size varies with the inputs in both of two values or in none: else they differ."""
    return len({isinstance(sizes(node)[dim], int) for node in (source, beside)}) == 1


def _neutral(node: fx.Node, source: fx.Node, beside: fx.Node) -> int:
    """Neutral padding of ``source`` at a node, beside ``beside``. Raises PSG320 for none."""
    if op(node) == "where":
        return int(node.args[0] is source and node.args[1] is beside)
    neutral = meaning(node).neutral
    if neutral is None:
        raise _refuse(node, f"'{source.name}' is about the keys that there were")
    return neutral


def _grown(node: fx.Node, tried: Values) -> dict[int, tuple[int, int]]:
    """Grown dimensions of a value, counted from the last, with both sizes."""
    if not isinstance(tried[node], torch.Tensor):
        return {}
    before, now = samples(node), tuple(tried[node].shape)
    dims = range(-1, -len(now) - 1, -1)
    return {dim: (before[dim], now[dim]) for dim in dims if before[dim] != now[dim]}


def _grows(node: fx.Node) -> bool:
    """Whether an operator may be run on more tokens as it was on fewer."""
    return has(node, GROWABLE) and not has(node, Trait.PARTING)


def _keeps(node: fx.Node, grown: Mapping[fx.Node, Mapping[int, Any]]) -> bool:
    """Whether a slice leaves tokens whole: it is of another dimension, or counts from the end."""
    if op(node) not in ("slice", "select"):
        return False
    source, given = node.all_input_nodes[0], arguments(node)
    dim = int(given["dim"])
    dim = dim if dim < 0 else dim - len(samples(source))
    start, end = given.get("start"), given.get("end")
    to_end = op(node) == "slice" and start in (None, 0) and isinstance(end, int) and end < 0
    return dim not in grown.get(source, {}) or to_end


def _expanded(node: fx.Node, tried: torch.Tensor) -> list[Any]:
    """The sizes of an expansion, with those that the value has already left to torch."""
    wanted: Any = [*cast("list[Any]", node.args[1])]
    for dim in range(-1, -tried.dim() - 1, -1):
        if tried.shape[dim] != 1:
            wanted[dim] = -1
    return wanted


def _viewed(node: fx.Node, tried: torch.Tensor) -> list[Any]:
    """The sizes of a view, with that of the dimension that tokens go to left to torch."""
    source = node.all_input_nodes[0]
    axis = [d for d, (a, b) in enumerate(zip(samples(source), tried.shape, strict=True)) if a != b]
    dim = _followed(samples(source), axis[0], samples(node)) if len(axis) == 1 else None
    wanted: Any = [*cast("list[Any]", node.args[1])]
    if dim is None:
        raise _refuse(node, "it mixes tokens with something else")
    for other, size in enumerate(wanted):
        if size == -1 and other != dim:
            known = value(node).shape[other]
            if not isinstance(known, int):
                raise _refuse(node, "two of its sizes are open")
            wanted[other] = known
    wanted[dim] = -1
    return wanted


def _followed(before: Sequence[int], axis: int, after: Sequence[int]) -> int | None:
    """Target dimension of an operand's dimension under a view; None if it is split."""
    i = j = 0
    while i < len(before) and j < len(after):
        first, start = i, j
        left, right, i, j = before[i], after[j], i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        if first <= axis < i:
            same = [other for other in range(start, j) if after[other] == before[axis]]
            return start if j - start == 1 else same[0] if len(same) == 1 else None
    return None


def _refuse(node: fx.Node, why: str) -> SurgeryError:
    message = f"the attention core cannot be run with more keys: at '{op(node)}', {why}"
    return SurgeryError("PSG320", message, "leave such cores out with `where:`")
