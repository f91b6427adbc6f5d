"""Loops in a program's graph: its nodes once, between two that say where a turn begins and ends.

    loop = loop_begins(n)                       for loop.turn in range(loop.count):
    i = loop_index(loop)                            i = loop_index(loop)
    s = loop_carried(loop, zeros, 0)                s = loop_carried(loop, zeros, 0)
    new = mul(select(a, 1, i), s)          ->       new = mul(select(a, 1, i), s)
    done = loop_turns(loop, [new], [new])           done = loop_turns(loop, [new], [new])
    out = loop_joined(loop, new, 0, 1)          out = loop_joined(loop, new, 0, 1)

The graph stays flat, so that whatever reads or copies it node by node (finders of sites, cuts,
splitters) finds the nodes of a turn among the others. Its code is a loop of Python that calls the
very operators of the original's in its order, so outputs and gradients have the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx


@dataclass
class Turns:
    """A loop that runs: how many turns it has, which it is in, and what the last one left."""

    count: int
    turn: int = 0
    carried: tuple[Tensor, ...] = ()
    kept: list[tuple[Tensor, ...]] = field(default_factory=list)


def loop_begins(count: int) -> Turns:
    """A loop of ``count`` turns."""
    return Turns(count)


def loop_index(loop: Turns) -> int:
    """The number of the turn, from nought."""
    return loop.turn


def loop_carried(loop: Turns, first: Tensor, number: int) -> Tensor:
    """What the turn before left under a number; in the first turn, ``first``."""
    return loop.carried[number] if loop.turn else first


def loop_turns(loop: Turns, carried: tuple[Tensor, ...], kept: tuple[Tensor, ...]) -> Turns:
    """The end of a turn: what the next one goes on with, and what is joined behind the loop."""
    loop.carried = tuple(carried)
    loop.kept.append(tuple(kept))
    return loop


def loop_joined(loop: Turns, last: Tensor, number: int, dim: int, stacked: bool) -> Tensor:
    """The values kept under a number, of all turns, stacked or concatenated; ``last`` is one."""
    values = [kept[number] for kept in loop.kept]
    return torch.stack(values, dim) if stacked else torch.cat(values, dim)


def has_loops(graph: fx.Graph) -> bool:
    """Whether a graph has a loop in it."""
    return any(True for _ in graph.find_nodes(op="call_function", target=loop_begins))


def counts_of_turns(graphs: Iterable[fx.Graph]) -> list[Any]:
    """How many turns the loops in some graphs have, as sizes."""
    nodes = (n for g in graphs for n in g.find_nodes(op="call_function", target=loop_begins))
    return [node.meta["val"] for node in nodes]


def as_run(graph: fx.Graph, values: Mapping[fx.Node, Any]) -> Iterator[fx.Node]:
    """The nodes of a graph in the order in which they run, those of a loop in every turn.

    Whoever runs them puts the value of each into ``values`` before asking for the next.
    """
    nodes = list(graph.nodes)
    place = {node: number for number, node in enumerate(nodes)}
    number = 0
    while number < len(nodes):
        node = nodes[number]
        yield node
        if node.target is loop_turns:
            begin: Any = node.args[0]
            loop = values[begin]
            loop.turn += 1
            number = place[begin] if loop.turn < loop.count else number
        number += 1


def left_before(node: fx.Node) -> list[fx.Node]:
    """What a carried value is after the first turn; nothing of any other."""
    if node.target is not loop_carried:
        return []
    begin, _, number = node.args
    assert isinstance(begin, fx.Node)
    ends: list[Any] = [user.args[1] for user in begin.users if user.target is loop_turns]
    return [carried[number] for carried in ends]


def turns_of(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The nodes within loops, each with the node where its loop begins."""
    found: dict[fx.Node, fx.Node] = {}
    begin: fx.Node | None = None
    for node in graph.nodes:
        if begin is not None:
            found[node] = begin
        if node.target is loop_begins:
            begin = node
        elif node.target is loop_turns:
            begin = None
    return found


_ASSIGNED = re.compile(r"\s*(\w+)\b[^=]* = ")
_FREED = re.compile(r";  ((?:\w+ = )+)None$")


def with_loops(source: str, scope: dict[str, Any]) -> str:
    """The source of a forward with a ``for`` around the lines of every turn.

    What was made before a loop and is last read in it is let go behind it.
    """
    names = {function: name for name, function in scope.items() if callable(function)}
    if loop_begins not in names:
        return source
    begin, end = (f" = {names.get(function)}(" for function in (loop_begins, loop_turns))
    lines, own, later = list[str](), set[str](), list[str]()
    depth = ""
    for line in source.splitlines():
        if depth and (freed := _FREED.search(line)):
            gone = freed[1].split(" = ")[:-1]
            outer = [name for name in gone if name not in own]
            later += outer
            line = line[: freed.start()] + _let_go(";  ", [n for n in gone if n not in outer])
        if depth and (assigned := _ASSIGNED.match(line)):
            own.add(assigned[1])
        lines.append(depth + line)
        if begin in line:
            name = line.split(begin)[0].strip()
            lines.append(f"    for {name}.turn in range({name}.count):")
            depth, own, later = "    ", set(), []
        elif end in line:
            depth = ""
            if later:
                lines.append(_let_go("    ", later))
    return "\n".join(lines)


def _let_go(before: str, names: list[str]) -> str:
    return before + "".join(f"{name} = " for name in names) + "None" if names else ""
