"""Which rows of a fused weight arrive at a value: row numbers pushed through the graph.

The output of a linear with ``out`` rows is replaced by the numbers 0 ... out-1 and every operator
between it and the value is done to the numbers: layout operators move them, entry-wise operators
keep them, reductions drop them. What arrives is exact, whatever order a model interleaves its
heads in. A number also remembers whether it went through an activation on the way, which tells the
gate of a gated feed-forward from its up projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.site import Slice
from peftsurgery.anatomy.values import (
    concrete,
    fixed,
    is_tensor,
    operands,
    sample,
    samples,
    shape,
    strip,
    value,
)
from peftsurgery.capture.schemas import arguments, op

NO_ROW = -1
LIMIT = 8  # alternatives kept at a node: a sum of two reorderings of the rows has two


class OpaqueError(Exception):
    """The rows cannot be followed through an operator."""


@dataclass(frozen=True)
class Numbers:
    """Row numbers in the shape of a value, and whether an activation was on their way."""

    rows: Tensor
    activated: bool = False


Carried = list[Numbers]


def arriving(
    source: fx.Node, target: fx.Node, nodes: Sequence[fx.Node], beside: bool = False, axis: int = -1
) -> dict[bool, set[int]]:
    """The rows of ``source``'s ``axis`` that ``target`` is made of: activated or not -> rows.

    ``nodes`` are the values between the two, in the graph's order, ``target`` among them.
    With ``beside`` they may be joined to other values. Raises OpaqueError where an operator on the
    way mixes rows.
    """
    found: dict[bool, set[int]] = {False: set(), True: set()}
    for numbers in _followed(source, target, nodes, beside, axis):
        found[numbers.activated].update(numbers.rows.unique().tolist())
    return {active: rows - {NO_ROW} for active, rows in found.items()}


def arriving_axis(source: fx.Node, target: fx.Node, nodes: Sequence[fx.Node], axis: int) -> int:
    """The axis of ``target`` that has all rows of ``source``'s ``axis``, in their order.

    Raises OpaqueError where there is none such, and as :func:`arriving` does.
    """
    for numbers in _followed(source, target, nodes, False, axis):
        for here, size in enumerate(numbers.rows.shape):
            rows = numbers.rows.movedim(here, -1)
            if size == samples(source)[axis] and rows.equal(torch.arange(size).expand_as(rows)):
                return here
    raise OpaqueError("rows that are no axis")


def most_entries(source: fx.Node, target: fx.Node, nodes: Sequence[fx.Node], axis: int) -> int:
    """In how many entries of ``target`` a row of ``source``'s ``axis`` is, at most; 0 if in none.

    Raises OpaqueError as :func:`arriving` does.
    """
    found = (numbers.rows for numbers in _followed(source, target, nodes, True, axis))
    counts = [rows[rows != NO_ROW].unique(return_counts=True)[1] for rows in found]
    return max((int(count.max()) for count in counts if len(count)), default=0)


def _followed(
    source: fx.Node, target: fx.Node, nodes: Sequence[fx.Node], beside: bool, axis: int
) -> Carried:
    """The row numbers that arrive at ``target``."""
    sizes = samples(source)
    first = torch.arange(sizes[axis]).expand(*sizes[:axis], *sizes[axis:][1:], sizes[axis])
    carried: dict[fx.Node, Any] = {source: [Numbers(first.movedim(-1, axis))]}
    for node in nodes:
        if node is not source:
            if beside and op(node) in ("cat", "concat"):
                others = [n for n in node.all_input_nodes if not carried.get(n) and is_tensor(n)]
                carried |= {n: [Numbers(torch.full(samples(n), NO_ROW))] for n in others}
            carried[node] = _push(node, carried)
    return carried.get(target) or []


def _push(node: fx.Node, carried: dict[fx.Node, Any]) -> Any:
    name = op(node)
    inputs = [n for n in operands(node) if carried.get(n)]
    if not inputs:
        return None
    if name == "getitem":
        return [piece[node.args[1]] for piece in carried[inputs[0]]]
    if name in _ONE_SIGNAL:
        return _ONE_SIGNAL[name](node, carried[inputs[0]])
    if is_grouped(node):
        signal = carried.get(node.all_input_nodes[0]) or []
        return [_repeated(node, n.rows.amax(-1, keepdim=True), n) for n in signal]
    if has(node, Trait.LAYOUT | Trait.PICK):
        return _moved(node, inputs, carried)
    if has(node, Trait.REDUCTION | Trait.TOTAL):
        pooled = _pooled(node, carried[inputs[0]])
        if pooled is not None or not has(node, Trait.CHOICE):
            return pooled  # a statistic over rows is no row
    if not shape(node):
        raise OpaqueError(name)
    return _entrywise(node, inputs, carried)


def _entrywise(node: fx.Node, inputs: Sequence[fx.Node], carried: dict[fx.Node, Any]) -> Carried:
    sizes = samples(node)
    activated = has(node, Trait.ACTIVATION)
    result: Carried = []
    for numbers in (n for operand in inputs for n in carried[operand]):
        if numbers.rows.dim() > len(sizes):
            raise OpaqueError(op(node))
        try:
            rows = numbers.rows.expand(sizes)
        except RuntimeError as error:
            raise OpaqueError(op(node)) from error
        result.append(Numbers(rows, numbers.activated or activated))
    return _distinct(result)


def _pooled(node: fx.Node, carried: Carried) -> Any:
    """Numbers after a maximum, a mean or a sum over tokens; None if different rows are reduced."""
    given = arguments(node)
    if given.get("dim") is None or any(isinstance(n, list) for n in carried):
        return None
    pooled = []
    for numbers in carried:
        least, most = (
            reduced(numbers.rows, given["dim"], given.get("keepdim", False))
            for reduced in (torch.amin, torch.amax)
        )
        if not least.equal(most):
            return None
        pooled.append(Numbers(least, numbers.activated))
    if isinstance(node.meta.get("val"), torch.Tensor):
        return pooled
    places = [Numbers(torch.full_like(n.rows, NO_ROW)) for n in pooled]  # where the greatest are
    return [list(pair) for pair in zip(pooled, places, strict=True)]


def _distinct(carried: Iterable[Numbers]) -> Carried:
    kept: Carried = []
    for numbers in carried:
        if not any(k.activated == numbers.activated and k.rows.equal(numbers.rows) for k in kept):
            kept.append(numbers)
    if len(kept) > LIMIT:
        raise OpaqueError("too many ways")
    return kept


def _moved(node: fx.Node, inputs: Sequence[fx.Node], carried: dict[fx.Node, Any]) -> Any:
    """Apply a layout operator to every alternative of row numbers."""
    if has(node, Trait.CAST):
        return carried[inputs[0]]
    ways = max(len(carried[operand]) for operand in inputs)
    result: list[Any] = []
    for way in range(ways):
        chosen = {n: carried[n][min(way, len(carried[n]) - 1)] for n in inputs}

        def real(n: fx.Node, chosen: dict[fx.Node, Numbers] = chosen) -> Any:
            if n in chosen:
                rows = chosen[n].rows.contiguous()
                if op(node) == "as_strided":
                    return _laid_out(rows, n)
                return rows.double() if op(node) == "view_as_complex" else rows
            found = n.meta.get("val")
            if isinstance(found, torch.Tensor):
                return _constant(n) if n in operands(node) else sample(n)
            return concrete(found)

        args = fx.map_arg(node.args, real)
        kwargs = fx.map_arg(dict(node.kwargs), real)
        activated = any(numbers.activated for numbers in chosen.values())
        assert callable(node.target)
        made = node.target(*args, **kwargs)
        if op(node) == "view_as_real":
            made = made.long()
        if isinstance(made, (list, tuple)):
            result.append([Numbers(piece, activated) for piece in made])
        else:
            result.append(Numbers(made, activated))
    return result


def _laid_out(rows: Tensor, node: fx.Node) -> Tensor:
    """Numbers in memory as a value lies there, for who reads memory and not axes."""
    strides = [concrete(stride) for stride in node.meta["val"].stride()]
    return torch.empty_strided(rows.shape, strides, dtype=rows.dtype).copy_(rows)


def _joined(node: fx.Node, carried: Carried) -> Carried:
    """Numbers of what every turn of a loop makes, where it is joined: one beside the other."""
    given: Any = node.args
    *_, dim, stacked = given
    firsts = [n.rows.unsqueeze(dim) if stacked else n.rows.narrow(dim, 0, 1) for n in carried]
    return [_repeated(node, rows, n) for rows, n in zip(firsts, carried, strict=True)]


def _remembered(node: fx.Node, carried: Carried) -> Carried:
    """Numbers behind those of earlier calls: the same for every token."""
    return [_repeated(node, n.rows[..., :1, :], n) for n in carried]


def _padded(node: fx.Node, carried: Carried) -> Carried:
    """Numbers in a value that is padded, where no other entries of it are repeated."""
    given = arguments(node)
    if given.get("mode", "constant") != "constant":
        raise OpaqueError(op(node))
    around = [concrete(value(size)) for size in given["pad"]]
    return [Numbers(functional.pad(n.rows, around, value=NO_ROW), n.activated) for n in carried]


def _repeated(node: fx.Node, rows: Tensor, numbers: Numbers) -> Numbers:
    """Numbers whose rows are the same for every token of a node."""
    return Numbers(rows.expand(samples(node)), numbers.activated)


def is_grouped(node: fx.Node) -> bool:
    """Whether a node is a convolution over tokens that makes as many channels, in groups.

    What is in one group stays there: whoever reads whole groups reads the rows that went in.
    """
    if not has(node, Trait.CONV) or len(node.all_input_nodes) < 2:
        return False
    signal, weight = (shape(n) for n in node.all_input_nodes[:2])
    return (
        len(weight) == 3
        and fixed(weight[0]) == fixed(signal[-2])
        and int(weight[1]) < int(weight[0])
        and not arguments(node).get("transposed", "output_padding" in arguments(node))
    )


def is_depthwise(node: fx.Node) -> bool:
    """Whether a node is a convolution over tokens that leaves every channel by itself."""
    return is_grouped(node) and fixed(shape(node.all_input_nodes[1])[1]) == 1


def _constant(node: fx.Node) -> Tensor:
    """The value of a constant tensor that the model made in Python, such as an index of heads."""
    inner = strip(node, Trait.CAST)
    known = getattr(inner.meta.get("val"), "constant", None)
    if not isinstance(known, Tensor):
        raise OpaqueError("an index or a second operand that is not made of rows")
    return known


def _glu(node: fx.Node, carried: Carried) -> Carried:
    dim = arguments(node)["dim"]
    result = []
    for numbers in carried:
        linear, gate = numbers.rows.chunk(2, dim)
        result += [Numbers(linear, numbers.activated), Numbers(gate, True)]
    return result


_ONE_SIGNAL: Mapping[str, Callable[[fx.Node, Carried], Carried]] = {
    "with_past": _remembered,
    "loop_joined": _joined,
    "loop_carried": lambda node, carried: carried,
    "glu": _glu,
    "pad": _padded,
    "constant_pad_nd": _padded,
}
"""What becomes of numbers at operators of a way of their own, which read one signal."""


def as_slice(rows: Iterable[int], whole: int) -> Slice | None:
    """The slice that holds exactly these rows of ``whole``, or None if they are not regular."""
    ordered = sorted(rows)
    if not ordered:
        return None
    start, length = ordered[0], 1
    while length < len(ordered) and ordered[length] == start + length:
        length += 1
    if length == len(ordered):
        return Slice(start, length, whole)
    period = ordered[length] - start
    if whole % period or len(ordered) % length or whole // period != len(ordered) // length:
        return None
    if start + length > period:
        return None
    made = Slice(start, length, period, whole // period)
    return made if made.indices() == ordered else None
