"""Adapters that do alike at a site, computed together: every row of a batch with its own.

    where(rows == 0, y + B0 A0 x, where(rows == 1, y + B1 A1 x, ...))        as many as adapters
 -> where(any of them, y + bmm(stack(B)[rows], bmm(stack(A)[rows], x)), y)   once

What the adapters insert is the same, node by node, but for the parameters that they read. What is
made of parameters alone (a product of two, a norm) stays as it is, for each adapter; where it meets
a value of the batch it is stacked, and every row takes its own. Which operators keep rows apart is
known of entry-by-entry ones, of products and of what goes along the last axes; a rule that needs
another operator is computed as ever, adapter by adapter for all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer

from peftsurgery.anatomy.ops import Trait, traits
from peftsurgery.anatomy.site import ATEN
from peftsurgery.capture.schemas import name_of
from peftsurgery.surgery.rewrite.batch_axis import Axis

BY_ENTRY = Trait.POINTWISE | Trait.ADDITION | Trait.SCALING | Trait.ACTIVATION | Trait.CAST
BY_ENTRY |= Trait.DROPOUT
ALSO_BY_ENTRY = frozenset({"truediv", "pow", "to"})
NOT_BY_ENTRY = frozenset({"glu", "prelu"})
ALONG_LAST = {"slice": (1,), "cat": (1,), "unflatten": (1,), "flatten": (1, 2), "narrow": (1,)}
"""By operator: the positions of the axes that it goes along."""
NORMS = frozenset({"layer_norm", "rms_norm"})
"""What goes along the last axes in any case."""


@dataclass(frozen=True)
class Grouped:
    """A value while adapters are grouped: one for all, one for each adapter, or of each row.

    ``dims`` is its number of axes; a value of rows has the batch, alone, as its first one. None is
    for what is no tensor.
    """

    nodes: tuple[fx.Node, ...]
    dims: int | None
    of_rows: bool = False

    @property
    def of_adapters(self) -> bool:
        """Whether every adapter has its own."""
        return len(self.nodes) > 1


class RowGroup:
    """The nodes that adapters inserted at one site, made into nodes for rows.

    ``index`` is the position of each row's adapter among them, (batch,). ``axis`` gives the batch
    axis of a node outside, None if it has none, and raises `UngroupableError` if that is not known;
    ``sample`` a tensor on meta, or a number, like the value of a node outside or of a parameter.
    """

    def __init__(
        self,
        tracer: GraphAppendingTracer,
        index: fx.Node,
        axis: Callable[[fx.Node], Axis | None],
        sample: Callable[[fx.Node], Any],
    ) -> None:
        self.tracer, self.index, self.axis, self.sample = tracer, index, axis, sample
        self.known: dict[fx.Node, Grouped] = {}
        self.samples: dict[fx.Node, Any] = {}
        self.taken: dict[fx.Node, fx.Node] = {}

    def of(self, inserted: Sequence[Sequence[fx.Node]], last: fx.Node) -> fx.Node:
        """The value of ``last``, an inserted node of the first adapter, of every row.

        ``inserted`` are the nodes of each adapter, in order. It has the axes of ``last``, the batch
        alone as the first. Raises `UngroupableError`.
        """
        if len({len(nodes) for nodes in inserted}) > 1:
            raise UngroupableError
        for step in zip(*inserted, strict=True):
            if len({(node.op, self._called(node)) for node in step}) > 1:
                raise UngroupableError
            self.known[step[0]] = self._made(step)
        found = self.value(last)
        if not found.of_rows:
            raise UngroupableError
        return found.nodes[0]

    def _called(self, node: fx.Node) -> Any:
        """What adapters must have in common: the operator, and all that is no node."""
        if node.op == "get_attr":
            return None
        return node.target, repr(map_arg((node.args, node.kwargs), lambda _: None))

    def _made(self, step: tuple[fx.Node, ...]) -> Grouped:
        first = step[0]
        self.samples[first] = self._sampled(first)
        dims = _dims(self.samples[first])
        if first.op == "get_attr":
            is_one = len({node.target for node in step}) == 1
            return Grouped(step[:1] if is_one else step, dims)
        if first.op not in ("call_function", "call_method"):
            raise UngroupableError
        given = [self.value(node) for node in first.all_input_nodes]
        if dims is not None and any(each.of_rows for each in given):
            more = self._split_axes(first)
            return Grouped((self._of_rows(first, given),), dims + more, of_rows=True)
        return Grouped(step if any(each.of_adapters for each in given) else step[:1], dims)

    def _split_axes(self, node: fx.Node) -> int:
        """How many axes more a node's values of rows have here than in the program."""
        rows = [each for each in node.all_input_nodes if self.value(each).of_rows]
        dims = [(self.value(each).dims or 0, self._sample_of(each).dim()) for each in rows]
        if len(set(dims)) > 1:
            raise UngroupableError
        return dims[0][0] - dims[0][1]

    def _sampled(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self.sample(node)
        args, kwargs = map_arg((node.args, node.kwargs), self._sample_of)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        target: Any = node.target
        return target(*args, **kwargs)

    def _sample_of(self, node: fx.Node) -> Any:
        if node not in self.samples:
            self.samples[node] = self.sample(node)
        return self.samples[node]

    def value(self, node: fx.Node) -> Grouped:
        """What stands for a node: of the first adapter's, or of the graph around them."""
        if node not in self.known:
            axis, dims = self.axis(node), _dims(self._sample_of(node))
            if axis is None or dims is None:
                self.known[node] = Grouped((node,), dims)
            else:
                dims += axis.together is not None
                first = batch_first(fx.Proxy(node, self.tracer), axis, self.count)
                self.known[node] = Grouped((first.node,), dims, of_rows=True)
        return self.known[node]

    @property
    def count(self) -> Any:
        """The size of the batch."""
        return ATEN.sym_size.int(fx.Proxy(self.index, self.tracer), 0)

    def _of_rows(self, node: fx.Node, given: Sequence[Grouped]) -> fx.Node:
        """A node of which some inputs are values of rows, for every row with its adapter's own."""
        name = node.target if node.op == "call_method" else name_of(node.target)
        if name in ("linear", "matmul") and any(each.of_adapters for each in given):
            return self._product(str(name), node)
        by_entry = bool(traits(node.target) & BY_ENTRY) or name in ALSO_BY_ENTRY
        if by_entry and name not in NOT_BY_ENTRY:
            dims = max(each.dims for each in given if each.of_rows and each.dims is not None)
            return self._emit(node, lambda each: self._beside(each, dims))
        is_product = name in ("linear", "matmul") and self.value(node.all_input_nodes[0]).of_rows
        axes = [node.args[each] for each in ALONG_LAST.get(str(name), ()) if each < len(node.args)]
        is_last = bool(axes) and all(isinstance(axis, int) and axis < 0 for axis in axes)
        is_last |= name in NORMS
        if any(each.of_adapters for each in given) or not (is_product or is_last):
            raise UngroupableError
        return self._emit(node, lambda each: each.nodes[0])

    def _emit(self, node: fx.Node, as_read: Callable[[Grouped], fx.Node]) -> fx.Node:
        """The node again, with its inputs as they are read now."""
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: as_read(self.value(n)))
        return self.tracer.create_node(node.op, node.target, args, kwargs)

    def _beside(self, each: Grouped, dims: int) -> fx.Node:
        """A value as an entry-by-entry operator reads it beside one of rows with ``dims`` axes."""
        if each.of_rows or each.dims is None or (not each.of_adapters and each.dims == 0):
            return each.nodes[0]  # a flag is the same for all adapters
        if each.dims > dims - 1:
            raise UngroupableError
        if not each.of_adapters:
            return each.nodes[0]
        value: Any = fx.Proxy(self._taken(each), self.tracer)
        for _ in range(dims - 1 - each.dims):
            value = ATEN.unsqueeze.default(value, 1)
        return self._node(value)

    def _product(self, name: str, node: fx.Node) -> fx.Node:
        """A product of a value of rows with a matrix of each adapter."""
        x, weight, *more = [self.value(each) for each in node.all_input_nodes]
        if not x.of_rows or not weight.of_adapters or weight.dims != 2 or x.dims is None:
            raise UngroupableError
        if x.dims < 2 or node.kwargs or any(each.of_rows for each in more):
            raise UngroupableError
        value: Any = fx.Proxy(x.nodes[0], self.tracer)
        matrix: Any = fx.Proxy(self._taken(weight), self.tracer)
        if name == "linear":
            matrix = ATEN.transpose.int(matrix, -1, -2)
        for _ in range(x.dims - 3):
            matrix = ATEN.unsqueeze.default(matrix, 1)
        if x.dims == 2:
            value = ATEN.squeeze.dim(ATEN.bmm.default(ATEN.unsqueeze.default(value, 1), matrix), 1)
        else:
            value = ATEN.matmul.default(value, matrix)
        for bias in more:
            value = ATEN.add.Tensor(value, fx.Proxy(self._beside(bias, x.dims), self.tracer))
        return self._node(value)

    def _taken(self, each: Grouped) -> fx.Node:
        """The value of each row's adapter, (batch, ...)."""
        first = each.nodes[0]
        if first not in self.taken:
            proxies = [fx.Proxy(node, self.tracer) for node in each.nodes]
            stacked = ATEN.stack.default(proxies)
            index = fx.Proxy(self.index, self.tracer)
            self.taken[first] = self._node(ATEN.index_select.default(stacked, 0, index))
        return self.taken[first]

    def _node(self, value: Any) -> fx.Node:
        node: fx.Node = value.node
        return node


class UngroupableError(Exception):
    """The adapters of a group do not do alike, or by an operator that may mix rows."""


def batch_first(value: Any, axis: Axis, count: Any) -> Any:
    """A value with the batch, alone, as its first axis."""
    if axis.together is None:
        return value if axis.dim == 0 else ATEN.transpose.int(value, 0, axis.dim)
    sizes = [count, -1] if axis.together else [-1, count]
    value = ATEN.unflatten.int(value, 0, sizes)
    return value if axis.together else ATEN.transpose.int(value, 0, 1)


def batch_back(value: Any, axis: Axis) -> Any:
    """The inverse of :func:`batch_first`."""
    if axis.together is None:
        return value if axis.dim == 0 else ATEN.transpose.int(value, 0, axis.dim)
    value = value if axis.together else ATEN.transpose.int(value, 0, 1)
    return ATEN.flatten.using_ints(value, 0, 1)


def like_on_meta(value: Any) -> Any:
    """A tensor on meta of a traced value's sizes, or the number that it is in the trace."""
    if isinstance(value, torch.SymInt):
        return value.node.hint
    if not isinstance(value, torch.Tensor):
        return value
    sizes = [size if isinstance(size, int) else size.node.hint for size in value.shape]
    return torch.empty(sizes, dtype=value.dtype, device="meta")


def _dims(sample: Any) -> int | None:
    return sample.dim() if isinstance(sample, torch.Tensor) else None
