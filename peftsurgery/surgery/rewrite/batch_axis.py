"""Batch axes of values, recognised by symbolic size and never by position.

The batch of a capture is the first axis of its first tensor input. A value has it if one of its
axes has that very size. An axis that holds the batch and others flattened into one (GPT-2 views
[batch, tokens, hidden] as [batch * tokens, hidden] for its products) is followed back to the view
that made it, which tells whether the rows of an element of the batch lie together or apart.

So a mean over the tokens of each sequence is taken wherever a model keeps its sequences and tokens.
Most keep values as (batch, tokens, features). torch's own attention puts the tokens first, and some
layers work on (batch * tokens, features): which axis is the batch is told there by the queries of
the program's attention cores, whose layout is known. All tokens of a batch that is always one are
of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import fx

from peftsurgery.anatomy import Site, analyse
from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.site import ATEN
from peftsurgery.anatomy.values import shape
from peftsurgery.capture import Capture, Program
from peftsurgery.capture.names import join
from peftsurgery.errors import SurgeryError

BY_ROW = Trait.POINTWISE | Trait.CAST | Trait.RESHAPE | Trait.PRODUCT | Trait.CONV
BY_ROW |= Trait.NORM | Trait.DROPOUT | Trait.SOFTMAX
"""What leaves the rows of the first axis where they are, if there are as many as before."""


@dataclass(frozen=True)
class Axis:
    """Position of the batch in a value: an axis, possibly flattened with others.

    ``together`` says of such an axis whether the entries of one element of the batch are neighbours
    or a batch apart; it is None where the axis is the batch alone.
    """

    dim: int
    together: bool | None = None


@dataclass(frozen=True)
class Batch:
    """Batch size of one program, as a symbolic expression of its graph."""

    size: Any

    def axis(self, node: fx.Node) -> Axis | None:
        """Batch axis of a node's value; None if it cannot be determined."""
        sizes = [expression(size) for size in shape(node)]
        if self.size == 1:
            return Axis(0)  # of a batch of one everything belongs to the one row
        found = [dim for dim, size in enumerate(sizes) if size == self.size]
        if len(found) == 1:
            return Axis(found[0])
        if found or not sizes or not self.is_multiple(sizes[0]):
            return None
        together = self.together(node, sizes[0])
        return None if together is None else Axis(0, together)

    def is_multiple(self, size: Any) -> bool:
        """Whether a size is a multiple of the batch size."""
        return self.size in sympy.Mul.make_args(size)

    def together(self, node: fx.Node, size: Any) -> bool | None:
        """Whether entries of one batch element are adjacent on a flattened first axis."""
        while node.op == "call_function":
            sources = [n for n in node.all_input_nodes if shape(n)]
            held = [n for n in sources if expression(shape(n)[0]) == size]
            if held and has(node, BY_ROW):
                node = held[0]
            elif sources and has(node, Trait.RESHAPE):
                return self.flattened(sources[0], size)
            else:
                return None
        return None

    def flattened(self, source: fx.Node, size: Any) -> bool | None:
        """How the first axes of ``source`` are flattened into this size: batch outermost or not."""
        product: Any = sympy.Integer(1)
        for dim, each in enumerate(shape(source)):
            product *= expression(each)
            if sympy.expand(product - size) == 0:
                where = [d for d in range(dim + 1) if expression(shape(source)[d]) == self.size]
                return {0: True, dim: False}.get(where[0]) if len(where) == 1 else None
        return None


def batches(capture: Capture) -> dict[tuple[str, Program], Batch]:
    """Find the batch of every program of a capture, by block and program.

    A program that no batch reaches is left out, and all are if the batch has a fixed size other
    than one. PSG313 if no input has an axis.
    """
    sizes = [expression(shape(node)[0]) for node in _tensor_inputs(capture.top)]
    if not sizes:
        raise SurgeryError("PSG313", "the model is given no tensor that has a batch")
    # a mask may call the batch by another name: the name that reaches most programs is taken
    return max((_reached(capture, size) for size in dict.fromkeys(sizes)), key=len)


def _reached(capture: Capture, size: Any) -> dict[tuple[str, Program], Batch]:
    """Programs that an input size reaches, with the symbol it has in each."""
    if size == 1:
        return {(path, p): Batch(size) for path, all_ in capture.programs.items() for p in all_}
    if size.is_number:
        return {}
    found = {("", capture.top): Batch(size)}
    for path in sorted(capture.programs, key=lambda path: (path != "", path.count("."))):
        for program in capture.programs[path]:
            if (path, program) in found:
                found |= _inner(capture, path, program, found[path, program])
    return found


def batch_input(capture: Capture) -> fx.Node:
    """First tensor input, whose first axis is the batch. Raises PSG313 if there is none."""
    for node in _tensor_inputs(capture.top):
        return node
    raise SurgeryError("PSG313", "the model is given no tensor that has a batch")


@lru_cache(maxsize=256)  # asked at every call, and a walk over a graph
def _tensor_inputs(program: Program) -> tuple[fx.Node, ...]:
    return tuple(node for node in program.graph.find_nodes(op="placeholder") if shape(node))


def _inner(
    capture: Capture, path: str, program: Program, batch: Batch
) -> Mapping[tuple[str, Program], Batch]:
    """Batches of called programs: the symbols that they have for the caller's batch size."""
    found: dict[tuple[str, Program], Batch] = {}
    for call in program.graph.find_nodes(op="call_module"):
        inner = join(path, str(call.target))
        called = next(p for p in capture.programs[inner] if p.label == call.kwargs["program"])
        inputs = called.graph.find_nodes(op="placeholder")
        names = {
            name
            for given, taken in zip(call.args, inputs, strict=False)
            if isinstance(given, fx.Node)
            for size, name in zip(_sizes(given), _sizes(taken), strict=False)
            # a program may be shared with a capture in which some value is one for all rows
            if size == batch.size and not name.is_number
        }
        if len(names) == 1:
            found[inner, called] = Batch(names.pop())
    return found


def _sizes(node: fx.Node) -> list[Any]:
    """Sizes of a tensor; of a node that stands for a number, that number."""
    value = node.meta.get("val")
    return [expression(s) for s in ([value] if isinstance(value, torch.SymInt) else shape(node))]


def expression(size: Any) -> Any:
    """A size as arithmetic on symbols."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


Outside = Callable[[fx.Node], Any]


def token_mean(v: Any, site: Site, program: Program, outside: Outside) -> Any:
    """Mean of v over the tokens of its sequence; v has the axes of the site's x.

    It goes with v in the shape that it has. At an attention core, whose values have a layout of
    their own, it is (batch, 1, features). PSG327 if it is not to be told what one sequence is.
    """
    batch, count = _batch(program), len(shape(site.nodes["x"]))
    if batch.size == 1:
        mean = ATEN.mean.dim(v, list(range(count - 1)), True)
        return ATEN.view.default(mean, [1, 1, -1]) if site.kind == "attention" else mean
    axis = _axis(site.nodes["x"], batch)
    if axis is None:
        raise _unknown(site)
    dim, is_flat = axis.dim, axis.together is not None
    if is_flat:
        sizes = [_size(site, program, batch, outside), -1]
        v = ATEN.unflatten.int(v, 0, sizes if axis.together else sizes[::-1])
        dim, count = (0 if axis.together else 1), count + 1
    tokens = [each for each in range(count - 1) if each != dim]
    mean = ATEN.mean.dim(v, tokens, True) if tokens else v
    if site.kind == "attention":
        return ATEN.flatten.using_ints(ATEN.transpose.int(mean, 0, dim), 1, -2)
    return ATEN.flatten.using_ints(ATEN.expand_as.default(mean, v), 0, 1) if is_flat else mean


def _batch(program: Program) -> Batch:
    """Batch of a program as its first attention core has it; without a size if it has none."""
    for site in analyse(program).sites:
        if site.kind == "attention":
            sizes = shape(site.nodes["q"])
            size = expression(sizes[0])
            return Batch(size if len(sizes) > 3 else size / site.facts["heads"])
    return Batch(None)


def _axis(x: fx.Node, batch: Batch) -> Axis | None:
    """Axis of x that holds the sequences; the first one if the batch is not recognisable."""
    sizes = [expression(size) for size in shape(x)]
    is_in_sight = batch.size in sizes or len(sizes) < 3
    if not is_in_sight:
        return Axis(0)
    return None if batch.size is None else batch.axis(x)


def _size(site: Site, program: Program, batch: Batch, outside: Outside) -> Any:
    """The number of sequences, read from an input of the program that has them apart."""
    for node in program.graph.find_nodes(op="placeholder"):
        axis = batch.axis(node)
        if axis is not None and axis.together is None:
            return ATEN.sym_size.int(outside(node), axis.dim)
    raise _unknown(site)


def _unknown(site: Site) -> SurgeryError:
    message = f"it is not known which of the tokens in '{site.module}' are of one sequence"
    return SurgeryError("PSG327", message, "leave such sites out with `where:`")
