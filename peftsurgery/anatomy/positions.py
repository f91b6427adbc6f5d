"""Position sites: where a model turns the positions of tokens into numbers.

    token    rows of a table of positions, cosines and sines of positions
    key      what biases the scores of attention by distance: the positions of its keys

Bindings: ``p``, whole numbers (those of keys have the tokens last), and ``y``, what is first made
of them. Facts: ``kind``; and ``causal``, whether the attention that the positions are for is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import fx

from peftsurgery.anatomy.embeddings import is_counted, is_held
from peftsurgery.anatomy.flow import Flow
from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.site import Site
from peftsurgery.anatomy.values import (
    backward,
    is_ancestor,
    is_tensor,
    operands,
    shape,
    sizes,
    value,
    width,
)
from peftsurgery.capture.schemas import op
from peftsurgery.reach import reach


def find_positions(flow: Flow, tables: Sequence[Site], cores: Sequence[Site]) -> list[Site]:
    """The position sites of a program; ``tables`` are its embeddings, ``cores`` its attention."""
    found: dict[tuple[fx.Node, fx.Node], Site] = {}
    for p, y, kind, module in (*_tables(tables), *_numbers(flow)):
        core = next((c for c in cores if is_ancestor(y, c.nodes["o"])), None)
        facts = {"kind": kind, "op": op(y)}
        site = Site(
            "positions",
            module,
            None,
            None,
            {"p": p, "y": y},
            facts,
            cores=() if core is None else (core,),
        )
        found.setdefault((p, y), site)
    return list(found.values())


def _tables(tables: Iterable[Site]) -> Iterator[tuple[fx.Node, fx.Node, str, str]]:
    """Tables of positions. One of distances is indexed by the difference of two positions."""
    for table in tables:
        if table.role != "embed.positions" or _is_used_up(table):
            continue
        ids, y = table.nodes["x"], table.nodes["y"]
        distance = next((n for n in backward([ids]) if _is_distance(n)), None)
        if distance is None:
            yield ids, y, "token", table.module
        else:
            last = sizes(distance)[-1]  # queries have a size of one there
            keys = next(n for n in operands(distance)[::-1] if sizes(n)[-1] == last)
            yield keys, distance, "key", table.module


def _is_used_up(table: Site) -> bool:
    """Whether the table has no rows for further tokens: every row is always in use."""
    count = shape(table.nodes["x"])[-1] if shape(table.nodes["x"]) else 0
    return not isinstance(count, torch.SymInt) and bool(count >= shape(table.nodes["W"])[0])


def _is_distance(node: fx.Node) -> bool:
    """Whether a node is the distance of every query to every key."""
    inputs = operands(node)
    if op(node) not in ("sub", "rsub") or len(inputs) != 2 or not all(map(is_counted, inputs)):
        return False
    return sizes(node) not in (sizes(inputs[0]), sizes(inputs[1]))


def _numbers(flow: Flow) -> Iterator[tuple[fx.Node, fx.Node, str, str]]:
    """Positions that become fractional numbers: angles, or biases that grow with distance."""
    for node in flow.nodes:
        whole = [n for n in operands(node) if is_tensor(n) and _is_whole(n) and _is_open(n)]
        if len(whole) != 1 or not flow.is_signal(node) or op(node) == "embedding":
            continue
        if has(node, Trait.PICK):
            if is_held(node.all_input_nodes[0]):
                yield whole[0], node, "token", ""
            continue
        later = list(reach([node], lambda found: filter(_is_fraction, found.users)))
        if any(has(n, Trait.WAVE) for n in later):
            yield whole[0], node, "token", ""
        elif is_counted(whole[0]) and _biases(whole[0], later):
            yield whole[0], node, "key", ""


def _is_whole(node: fx.Node) -> bool:
    dtype = value(node).dtype
    return not dtype.is_floating_point and dtype != torch.bool


def _is_open(node: fx.Node) -> bool:
    """Whether the number of positions varies with the text's length."""
    return any(isinstance(size, torch.SymInt) for size in shape(node))


def _is_fraction(node: fx.Node) -> bool:
    return node.op == "call_function" and is_tensor(node) and value(node).is_floating_point()


def _biases(p: fx.Node, later: Iterable[fx.Node]) -> bool:
    """Whether a block receives a value made of these positions, with tokens on its last axis."""
    passed = [n for n in later if any(user.op == "call_module" for user in n.users)]
    tokens = sizes(p)[-1:]
    return width(p) is None and any(sizes(n)[-1:] == tokens for n in passed)
