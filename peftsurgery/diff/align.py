"""align: which nodes of two graphs are the same.

What has its name and its neighbourhood is paired first; then what is between paired nodes; then,
without names, what has the same structure, so that a renamed part and a moved part are told from a
new one; at last what stands in the same place and does something else. Each stage looks at what the
earlier ones left, in time linear in that. Nothing depends on which graph comes first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping

from peftsurgery.diff.description import Node
from peftsurgery.diff.hashes import (
    Label,
    Nodes,
    SharedNumbers,
    balls,
    bare_operator,
    both,
    down,
    up,
    users,
    with_names,
    without_names,
)

Pairs = dict[str, str]
Alike = Callable[[Node, Node], bool]
RADIUS = 2
CALL = "call"
"""The op of a block's call; what is behind it and a space says which block's."""


def align(a: Nodes, b: Nodes) -> Pairs:
    """The nodes of ``a`` and what each is in ``b``; a node without a partner is left out."""
    matching = _Matching(a, b)
    numbers = SharedNumbers()
    _by_trees(matching, with_names, numbers)
    matching.pair_equal(*(_labels(nodes, with_names) for nodes in (a, b)))
    matching.spread(lambda one, other: one.op == other.op and one.module == other.module)
    matching.pair_equal(*(_labels(nodes, _located) for nodes in (a, b)))
    _by_trees(matching, without_names, numbers)
    matching.spread(lambda one, other: one.op == other.op)
    matching.pair_equal(*(balls(nodes, bare_operator, numbers, RADIUS) for nodes in (a, b)))
    matching.spread(_may_be_retyped)
    ends = [[key for key, node in nodes.items() if node.op == "output"] for nodes in (a, b)]
    matching.add(pair for pair in zip(*ends, strict=False) if pair[0] not in matching.pairs)
    return matching.pairs


def _by_trees(matching: _Matching, label: Label, numbers: SharedNumbers) -> None:
    ups = [up(nodes, label, numbers) for nodes in (matching.a, matching.b)]
    downs = [down(nodes, label, numbers) for nodes in (matching.a, matching.b)]
    matching.pair_equal(*(both(*each) for each in zip(ups, downs, strict=True)))
    matching.pair_equal(*ups)
    matching.pair_equal(*downs)


def _labels(nodes: Nodes, label: Label) -> dict[str, Hashable]:
    return {key: label(node) for key, node in nodes.items()}


def _located(node: Node) -> Hashable:
    """Where a node stands; one that no module of its own made stands nowhere."""
    return (node.op, node.module) if node.module else object()


def _may_be_retyped(one: Node, other: Node) -> bool:
    """Whether one operator may stand for another: both compute something, of as many values."""
    fixed = {"read", "input", "output", CALL}
    ops = {each.op.partition(" ")[0] for each in (one, other)}
    same = one.op == other.op
    return same or (not ops & fixed and len(one.operands) == len(other.operands))


class _Matching:
    """The pairs found so far, and how to find more."""

    def __init__(self, a: Nodes, b: Nodes) -> None:
        self.a, self.b = a, b
        self.pairs: Pairs = {}
        self.taken: set[str] = set()
        self.used = users(a), users(b)

    def add(self, found: Iterable[tuple[str, str]]) -> None:
        for one, other in found:
            self.pairs[one] = other
            self.taken.add(other)

    def pair_equal(self, of_a: Mapping[str, Hashable], of_b: Mapping[str, Hashable]) -> None:
        """Pair what has an equal value, where both graphs have as many of it left.

        Of several, one that takes the pairs of the same operands comes first, else the next.
        """
        left = Counter(of_a[key] for key in self.a if key not in self.pairs)
        others = [key for key in self.b if key not in self.taken]
        right = Counter(of_b[key] for key in others)
        waiting: dict[Hashable, dict[str, None]] = {}
        for key in others:
            value = of_b[key]
            if left[value] == right[value]:
                waiting.setdefault(value, {})[key] = None
                waiting.setdefault((value, self.b[key].operands), {})[key] = None
        for one in [key for key in self.a if key not in self.pairs]:
            value = of_a[one]
            if value not in waiting:
                continue
            taken_in = tuple(self.pairs.get(each, "") for each in self.a[one].operands)
            other = next(iter(waiting.get((value, taken_in)) or waiting[value]))
            for place in (value, (value, self.b[other].operands)):
                del waiting[place][other]
            self.add([(one, other)])

    def spread(self, alike: Alike) -> None:
        """Pair neighbours of pairs, as long as there are such that could be nothing else."""
        fresh = list(self.pairs.items())
        while fresh:
            wanted: dict[str, set[str]] = {}
            wanting: dict[str, set[str]] = {}
            for pair in fresh:
                for one, other in self._beside(*pair, alike):
                    wanted.setdefault(one, set()).add(other)
                    wanting.setdefault(other, set()).add(one)
            fresh = [
                (one, other)
                for one, others in wanted.items()
                if len(others) == 1
                for other in others
                if len(wanting[other]) == 1
            ]
            self.add(fresh)

    def _beside(self, one: str, other: str, alike: Alike) -> Iterator[tuple[str, str]]:
        """Unpaired operands and users of a pair that stand in the same place."""
        inner = self.a[one].operands, self.b[other].operands
        if len(inner[0]) == len(inner[1]):
            yield from self._free(zip(*inner, strict=True), alike)
        users_of = self.used[0][one], self.used[1][other]
        for user, position in users_of[0]:
            if user not in self.pairs:
                found = ((user, key) for key, place in users_of[1] if place == position)
                yield from self._free(found, alike)

    def _free(self, pairs: Iterable[tuple[str, str]], alike: Alike) -> Iterator[tuple[str, str]]:
        for one, other in pairs:
            free = one not in self.pairs and other not in self.taken
            if free and alike(self.a[one], self.b[other]):
                yield one, other
