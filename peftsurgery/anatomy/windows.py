"""Sliding windows: how many tokens back a model's attention sees.

    keys > queries - 4             positions compared, one of them moved by a constant
    queries // 4 == keys // 4      positions in chunks of a constant size
    a table of who sees whom       whose last row has no first entry

Found in the masks that the captured graphs compute or read: a model that makes such a mask only for
texts longer than the captured one has it in no graph.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator

import torch
from torch import Tensor, fx

from peftsurgery.anatomy.attention import is_position
from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.values import operands
from peftsurgery.capture import Capture
from peftsurgery.capture.names import join
from peftsurgery.capture.schemas import op

MOVES, CHUNKS = ("add", "sub"), ("div", "floor_divide")
TRUTHS = (torch.bool, torch.uint8)


def windows(capture: Capture, tensor: Callable[[str], Tensor | None]) -> set[int]:
    """The sizes of the windows in a capture's masks, in tokens.

    ``tensor`` gives the buffers of the model by name, or None for what has no values.
    """
    found: set[int] = set()
    for block, programs in capture.programs.items():
        for program in programs:
            found |= {size for node in program.graph.nodes for size in _compared(node)}
            for node in program.graph.find_nodes(op="get_attr"):
                name = join(block, str(node.target))
                found |= set(_seen(tensor(name)))
    return found


def _compared(node: fx.Node) -> Iterator[int]:
    """The window of a comparison of positions, if it is one that has any."""
    both = operands(node)
    orders = has(node, Trait.COMPARISON)
    if not (orders or op(node) == "eq") or len(both) != 2 or not all(map(is_position, both)):
        return
    steps = [_step(each, MOVES if orders else CHUNKS) for each in both]
    if orders:
        yield from (abs(step) for step in steps if step)
    elif None not in steps and steps[0] == steps[1]:
        yield from (step for step in steps[:1] if step)


def _step(node: fx.Node, names: Container[str]) -> int | None:
    """The constant that positions were moved or divided by, behind changes of their layout."""
    while has(node, Trait.LAYOUT) and operands(node):
        node = operands(node)[0]
    constants = [each for each in node.args[1:] if isinstance(each, int)]
    return constants[0] if op(node) in names and constants else None


def _seen(table: Tensor | None) -> Iterator[int]:
    """The window of a table of which queries (rows) see which keys, if it is one that has any."""
    if table is None or table.is_meta or table.dtype not in TRUTHS or table.dim() < 2:
        return
    rows = table.reshape(-1, *table.shape[-2:])[0]
    if len(rows) == rows.shape[1] > 1 and rows[-1, -1] and not rows[-1, 0]:
        yield int(rows[-1].count_nonzero())
