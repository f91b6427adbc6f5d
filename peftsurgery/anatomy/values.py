"""The values of a graph: their sizes, what they are computed from, and which are parameters.

Sizes come in two kinds: as the captured example had them (``concrete``, ``samples``), to run
operators on stand-ins; and as what holds for every input (``sizes``, ``fixed``), to decide by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.capture.schemas import op
from peftsurgery.capture.sizes import as_known
from peftsurgery.reach import reach


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
    return tuple(as_known(size) for size in shape(node))


def fixed(size: Any) -> int | None:
    """A size if it is the same for every input, else None."""
    found = as_known(size)
    return found if isinstance(found, int) else None


def width(node: fx.Node) -> int | None:
    """The last size of a tensor if it is the same for every input."""
    return fixed(shape(node)[-1]) if shape(node) else None


def fixed_width(node: fx.Node) -> dict[str, int]:
    """The fact ``width`` of a site at a value, if its last size is the same for every input."""
    size = width(node)
    return {} if size is None else {"width": size}


def samples(node: fx.Node) -> tuple[int, ...]:
    """Concrete example sizes of a tensor, to run operators on stand-ins of it."""
    return tuple(concrete(size) for size in shape(node))


def is_tensor(node: Any) -> bool:
    """Whether the argument is a node that stands for a tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensor operands of a node, in order; sizes and scalars are left out.

    A tensor of which an operator takes only the shape or the dtype is none, nor is the device of a
    tensor one; keys behind those that were remembered come from the new keys.
    """
    if op(node) == "with_past" or has(node, Trait.RESHAPE | Trait.EXPANSION | Trait.CAST):
        return [n for n in node.all_input_nodes[:1] if not is_size(n)]
    if has(node, Trait.LIKE):
        return []
    return [n for n in node.all_input_nodes if not is_size(n) and op(n) != "device_of"]


def is_size(node: fx.Node) -> bool:
    """Whether a node stands for a number: a symbolic size, a scalar, a flag."""
    numbers = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
    return isinstance(node.meta.get("val"), numbers)


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


def strip(node: fx.Node, through: Trait) -> fx.Node:
    """Follow such operators backwards, by their first operand; returns the first other value."""
    while has(node, through) and node.all_input_nodes:
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
        if is_swap(node):
            flipped = not flipped
        elif not has(node, Trait.CAST):
            return None, False
        node = node.all_input_nodes[0]
    return None, False


def is_swap(node: fx.Node) -> bool:
    """Whether a node is a view that swaps the last two dims of its operand, and no more."""
    if not has(node, Trait.VIEW) or has(node, Trait.CAST) or len(shape(node)) < 2:
        return False
    target: Any = node.target
    given: Any = fx.map_arg(node.args, sample)
    source, *others = given
    if source.dim() != len(shape(node)):
        return False
    seen, swapped = target(source, *others), source.mT
    return bool((seen.shape, seen.stride()) == (swapped.shape, swapped.stride()))


def sample(node: fx.Node) -> Any:
    """A stand-in for the value of a node: on the meta device, of the example's sizes."""
    found = value(node)
    if isinstance(found, list | tuple):
        return [_sample(item) for item in found]
    return _sample(found)


def _sample(found: Any) -> Any:
    if isinstance(found, torch.Tensor):
        return torch.empty([concrete(s) for s in found.shape], dtype=found.dtype, device="meta")
    if isinstance(found, torch.SymInt):
        return concrete(found)
    return 0 if found is None else found  # a flag of the mode, a rate: off
