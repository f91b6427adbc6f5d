"""The mean over the tokens of each sequence, wherever a model keeps its sequences and tokens.

Most models keep values as (batch, tokens, features). torch's own attention puts the tokens first,
and some layers work on (batch * tokens, features). Which axis is the batch is told by the queries
of the program's attention cores, whose layout is known. All tokens of a batch that is always one
are of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from peftsurgery.anatomy import Site, analyse
from peftsurgery.anatomy.ops import shape
from peftsurgery.anatomy.site import ATEN
from peftsurgery.capture import Program
from peftsurgery.errors import SurgeryError
from peftsurgery.surgery.rewrite.batch_axis import Axis, Batch, expression

Outside = Callable[[fx.Node], Any]


def token_mean(v: Any, site: Site, program: Program, outside: Outside) -> Any:
    """The mean of v over the tokens of its sequence; v has the axes of the site's x.

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
    """The batch of a program, as its first attention core has it; of no size without one."""
    for site in analyse(program).sites:
        if site.kind == "attention":
            sizes = shape(site.nodes["q"])
            size = expression(sizes[0])
            return Batch(size if len(sizes) > 3 else size / site.facts["heads"])
    return Batch(None)


def _axis(x: fx.Node, batch: Batch) -> Axis | None:
    """Where the sequences of x are; on the first axis of several if the batch is not in sight."""
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
    return SurgeryError(
        "PSG327",
        f"it is not known which of the tokens in '{site.module}' are of one sequence",
        "leave such sites out with `where:`",
    )
