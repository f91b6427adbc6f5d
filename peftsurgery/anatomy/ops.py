"""Graph walks and queries over ATen operators: names, shapes, operands, ancestors.

An operator is known by its name without overload (``linear``, ``view``, ``getitem``), whichever of
the exporter's spellings it has. *Layout* operators only move entries; *transparent* operators act
on entries one at a time or normalise them, so that a value behind them is still the same signal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import fx

from peftsurgery.reach import reach


def words(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


LAYOUT = words(
    """view reshape _unsafe_view view_as reshape_as flatten unflatten transpose permute t swapaxes
    movedim numpy_T matrix_H mT adjoint unsqueeze squeeze expand expand_as contiguous clone alias
    detach select slice narrow split split_with_sizes chunk tensor_split unbind getitem to _to_copy
    type_as lift_fresh repeat repeat_interleave cat stack concat roll flip with_past"""
)
DROPOUT = words("dropout dropout_ native_dropout feature_dropout bernoulli")
NORMS = words("layer_norm rms_norm group_norm batch_norm instance_norm")
ACTIVATIONS = words(
    """gelu relu relu6 silu sigmoid tanh erf elu selu celu leaky_relu hardtanh hardswish
    hardsigmoid mish softplus prelu rrelu relu_ silu_ gelu_ log_sigmoid glu"""
)
SCALING = words("mul div neg mul_ div_")
ADDITION = words("add add_ sub")


@cache
def _named(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__
    return getattr(target, "__name__", str(target))


def op(node: fx.Node) -> str:
    """The operator's name without namespace and overload; the empty string for other nodes."""
    return _named(node.target) if node.op == "call_function" else ""


def value(node: Any) -> Any:
    """Fake tensor (or number) of a node; an argument that is no node as it is."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def shape(node: fx.Node) -> tuple[Any, ...]:
    """The sizes of the tensor a node stands for, symbols included; empty if it is no tensor."""
    found = value(node)
    return tuple(found.shape) if isinstance(found, torch.Tensor) else ()


def sizes(node: fx.Node) -> tuple[Any, ...]:
    """The sizes of a tensor to compare: numbers, and arithmetic on symbols where a size varies.

    Two sizes are equal if they are so for every input, whatever the example's were. Comparing the
    symbols themselves would add guards to the capture.
    """
    return tuple(expression(size) for size in shape(node))


def expression(size: Any) -> Any:
    """A size as a number, or as arithmetic on symbols if it varies."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    found, ranges = size.node.expr, size.node.shape_env.var_to_range
    known = {symbol: ranges[symbol] for symbol in found.free_symbols if symbol in ranges}
    found = found.xreplace({s: r.lower for s, r in known.items() if r.is_singleton()})
    return int(found) if found.is_number else found


def fixed(size: Any) -> int | None:
    """A size if it is the same for every input, else None."""
    found = expression(size)
    return found if isinstance(found, int) else None


def width(node: fx.Node) -> int | None:
    """The last size of a tensor if it is the same for every input."""
    return fixed(shape(node)[-1]) if shape(node) else None


def samples(node: fx.Node) -> tuple[int, ...]:
    """Concrete example sizes of a tensor, to run operators on stand-ins of it."""
    return tuple(concrete(size) for size in shape(node))


def is_tensor(node: Any) -> bool:
    """Whether the argument is a node that stands for a tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensor operands of a node, in order; sizes and scalars are left out.

    An operator that takes only the shape or the dtype of a tensor has none, nor is the device of a
    tensor one; keys behind those that were remembered come from the new keys.
    """
    name = op(node)
    if name == "with_past":
        return node.all_input_nodes[:1]
    if name.endswith("_like") or name.startswith("new_"):
        return []
    return [n for n in node.all_input_nodes if not is_size(n) and op(n) != "device_of"]


def is_size(node: fx.Node) -> bool:
    """Whether a node stands for a number: a symbolic size, a scalar, a flag."""
    return isinstance(
        node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
    )


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, however it was passed."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def concrete(size: Any) -> int:
    """A size as a number: a symbol counts as the size the capture's example had.

    A symbol without an example becomes a small number that depends on its name only.
    """
    if not isinstance(size, torch.SymInt):
        return int(size)
    node = size.node
    if node.has_hint():
        return int(node.hint)
    symbols = sorted(node.expr.free_symbols, key=str)
    return int(node.expr.subs({s: 2 + sum(map(ord, str(s))) % 5 for s in symbols}))


def strip(node: fx.Node, names: Iterable[str]) -> fx.Node:
    """Follow unary operators of these names backwards; returns the first other value."""
    accepted = frozenset(names)
    while op(node) in accepted and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def backward(
    start: Iterable[fx.Node], stop: Callable[[fx.Node], bool] | None = None
) -> Iterator[fx.Node]:
    """Yield ``start`` and every tensor that it is computed from, sizes excluded.

    A node for which ``stop`` holds is given, but not what it is computed from.
    """
    return reach(start, operands, stop)


def is_ancestor(node: fx.Node, of: fx.Node) -> bool:
    """Whether ``of`` is computed from ``node``."""
    return node is not of and node in backward([of])


def parameter_of(node: Any) -> tuple[fx.Node | None, bool]:
    """The ``get_attr`` node a weight operand reads, and whether it was transposed on the way.

    Casts are looked through. The result is (None, False) for a value that is computed.
    """
    flipped = False
    while isinstance(node, fx.Node):
        if node.op == "get_attr":
            return node, flipped
        name = op(node)
        if name in ("t", "numpy_T", "mT", "transpose", "permute"):
            if not is_swap(node):
                return None, False
            flipped = not flipped
        elif name not in ("to", "_to_copy", "alias", "detach", "contiguous", "clone", "type_as"):
            return None, False
        node = node.all_input_nodes[0]
    return None, False


def is_swap(node: fx.Node) -> bool:
    """Whether a layout operator swaps the last two dims of its operand and nothing else."""
    rank = len(shape(node))
    name = op(node)
    if rank < 2:
        return False
    if name in ("t", "numpy_T"):
        return rank == 2
    if name == "mT":
        return True
    last = {rank - 1, rank - 2}
    if name in ("transpose", "swapaxes"):
        dims = {int(argument(node, i, f"dim{i - 1}")) % rank for i in (1, 2)}
        return dims == last
    if name != "permute":
        return False
    order = [int(d) % rank for d in argument(node, 1, "dims")]
    return order == [*range(rank - 2), rank - 1, rank - 2]
