"""Hashes by which nodes of two graphs are known to be alike (Weisfeiler and Lehman, 1968).

A node's *up* hash is what it is computed from, its *down* hash what is computed from it, its *ball*
what is around it. Each is a number that both graphs share, so that equal numbers mean equal
structures and not only equal digests.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

from peftsurgery.diff.description import Node

Nodes = Mapping[str, Node]
Label = Callable[[Node], Hashable]


class SharedNumbers:
    """Gives equal things equal numbers."""

    def __init__(self) -> None:
        self._known: dict[Hashable, int] = {}

    def of(self, thing: Hashable) -> int:
        """The number of a thing."""
        return self._known.setdefault(thing, len(self._known))


def users(nodes: Nodes) -> dict[str, list[tuple[str, int]]]:
    """The nodes that take each node in, and as which operand."""
    found: dict[str, list[tuple[str, int]]] = {key: [] for key in nodes}
    for key, node in nodes.items():
        for position, operand in enumerate(node.operands):
            found[operand].append((key, position))
    return found


def with_names(node: Node) -> Hashable:
    """A node with the names of its module and its tensor, an input with its dtype.

    What a block is given is numbered, and with one more before it a mask has a size's number.
    """
    dtype = node.shape.partition("[")[0] if node.op == "input" else ""
    return node.op, node.module, node.form, dtype


def without_names(node: Node) -> Hashable:
    """A node without names: a tensor that is read is known by its shape."""
    known_by_shape = node.op in ("read", "input")
    return node.op, node.shape if known_by_shape else node.form


def bare_operator(node: Node) -> Hashable:
    """What a node does, whatever its constants."""
    return node.op


def up(nodes: Nodes, label: Label, numbers: SharedNumbers) -> dict[str, int]:
    """A number for the tree that each node is computed by."""
    found: dict[str, int] = {}
    for key, node in nodes.items():
        inner = tuple(found[operand] for operand in node.operands)
        found[key] = numbers.of(("up", label(node), inner))
    return found


def down(nodes: Nodes, label: Label, numbers: SharedNumbers) -> dict[str, int]:
    """A number for all that is computed from each node."""
    found: dict[str, int] = {}
    used = users(nodes)
    for key in list(nodes)[::-1]:
        outer = tuple(sorted((found[user], position) for user, position in used[key]))
        found[key] = numbers.of(("down", label(nodes[key]), outer))
    return found


def balls(nodes: Nodes, label: Label, numbers: SharedNumbers, radius: int) -> dict[str, int]:
    """A number for what is within so many steps of each node."""
    used = users(nodes)
    found = {key: numbers.of(("ball", label(node))) for key, node in nodes.items()}
    for _ in range(radius):
        found = {
            key: numbers.of((
                found[key],
                tuple(found[operand] for operand in node.operands),
                tuple(sorted((found[user], position) for user, position in used[key])),
            ))
            for key, node in nodes.items()
        }  # fmt: skip
    return found


def both(*tables: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Several numbers of each node as one value."""
    first: Sequence[str] = list(tables[0])
    return {key: tuple(table[key] for table in tables) for key in first}
