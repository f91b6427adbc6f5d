"""align_blocks: which block of one model is which of another.

Blocks stand in lists. Lists are paired by their path, and what is left of them in order; two lists
by the cheapest edits that make one of the other, where a block costs by how far its shape class is
from the other's. A layer put in the middle is so one insertion, and what comes behind it has moved.
Blocks that changed places are those that they are equal to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence

from peftsurgery.capture.names import join
from peftsurgery.diff.description import Description, graph_form
from peftsurgery.diff.hashes import SharedNumbers, without_names

BlockPairs = dict[str, str]
GAP = 0.5
"""The cost of a block without a partner; that of two unlike ones is at most 1."""


def align_blocks(a: Description, b: Description) -> BlockPairs:
    """The paths of ``a``'s blocks and what each is in ``b``; the top, "", is itself."""
    classes = Classes(a, b)
    left, right = _lists(a), _lists(b)
    pairs: BlockPairs = {"": ""}
    for depth in sorted({path.count(".") for path in left}):
        mine = [path for path in left if path.count(".") == depth]
        for one, other in _paired_lists(mine, list(right), pairs):
            found = classes.edits(left[one], right.pop(other))
            pairs.update(found)
    return pairs


def translated_path(path: str, pairs: Mapping[str, str]) -> str | None:
    """A path of ``a`` as it is in ``b``, by the innermost block around it; None if that is gone."""
    names = path.split(".")
    for end in range(len(names), 0, -1):
        block = ".".join(names[:end])
        if block in pairs:
            return join(pairs[block], ".".join(names[end:]))
    return path


class Classes:
    """How far the shape classes of two models are from each other."""

    def __init__(self, a: Description, b: Description) -> None:
        self.sides = a, b
        numbers = SharedNumbers()
        self.forms = tuple(
            {n: numbers.of(graph_form(c)) for n, c in d.classes.items()} for d in (a, b)
        )
        self._counted: dict[tuple[int, tuple[str, ...]], Counter[Hashable]] = {}
        self._costs: dict[tuple[tuple[str, ...], tuple[str, ...]], float] = {}

    def labels(self, side: int, path: str) -> tuple[str, ...]:
        """The shape classes of a block."""
        return self.sides[side].blocks[path]

    def equal(self, one: tuple[str, ...], other: tuple[str, ...]) -> bool:
        """Whether two blocks have the same structure, names included."""
        left, right = self.forms
        return [left[label] for label in one] == [right[label] for label in other]

    def cost(self, one: tuple[str, ...], other: tuple[str, ...]) -> float:
        """0 for equal structures; up to 1, by the share of operations they do not share."""
        key = one, other
        if key not in self._costs:
            left, right = self._counts(0, one), self._counts(1, other)
            whole = (left | right).total()
            apart = 1 - (left & right).total() / max(whole, 1)
            self._costs[key] = 0.0 if self.equal(*key) else max(apart, 1e-3)
        return self._costs[key]

    def _counts(self, side: int, labels: tuple[str, ...]) -> Counter[Hashable]:
        key = side, labels
        if key not in self._counted:
            nodes = (n for x in labels for n in self.sides[side].classes[x].nodes.values())
            self._counted[key] = Counter(without_names(node) for node in nodes)
        return self._counted[key]

    def edits(self, left: Sequence[str], right: Sequence[str]) -> BlockPairs:
        """The blocks of two lists that are each other, by the fewest edits."""
        ones = [self.labels(0, path) for path in left]
        others = [self.labels(1, path) for path in right]
        first = _common(zip(ones, others, strict=False), self)
        rest = slice(first, None)
        last = _common(zip(ones[rest][::-1], others[rest][::-1], strict=False), self)
        inner = slice(first, -last or None)
        places = _cheapest(ones[inner], others[inner], self)
        pairs = dict(zip(left[:first], right[:first], strict=True))
        pairs.update((left[first + i], right[first + j]) for i, j in places)
        if last:
            pairs.update(zip(left[-last:], right[-last:], strict=True))
        return self.exchanged(pairs)

    def exchanged(self, pairs: BlockPairs) -> BlockPairs:
        """The pairs, but of blocks that only changed places each with the one it is equal to.

        Those are unlike pairs in a ring: each one's second block is equal to the first of the next.
        """
        unlike = {
            one: other
            for one, other in pairs.items()
            if not self.equal(self.labels(0, one), self.labels(1, other))
        }
        origins: BlockPairs = {}
        for one, other in unlike.items():
            labels = self.labels(1, other)
            equal = (each for each in unlike if self.equal(self.labels(0, each), labels))
            found = next((each for each in equal if each not in origins.values()), None)
            if found is not None:
                origins[one] = found
        rings = (_ring(one, origins) for one in origins)
        moved = {origins[one]: unlike[one] for ring in rings for one in ring}
        return {one: moved.get(one, other) for one, other in pairs.items()}


def _ring(start: str, following: Mapping[str, str]) -> list[str]:
    """What comes back to the start by following on; nothing if it does not."""
    ring = [start]
    while (after := following.get(ring[-1])) not in (start, None):
        if after in ring:
            return []
        ring.append(str(after))
    return ring if after == start else []


def _common(pairs: Iterator[tuple[tuple[str, ...], tuple[str, ...]]], classes: Classes) -> int:
    """How many pairs at the start are equal."""
    count = 0
    for pair in pairs:
        if not classes.equal(*pair):
            break
        count += 1
    return count


def _cheapest(
    ones: Sequence[tuple[str, ...]], others: Sequence[tuple[str, ...]], classes: Classes
) -> list[tuple[int, int]]:
    """The places that are paired by the cheapest edits (Wagner and Fischer, 1974)."""
    if len(ones) == len(others) and len(set(ones)) <= 1 and len(set(others)) <= 1:
        return [(place, place) for place in range(len(ones))]
    table = [[GAP * column for column in range(len(others) + 1)]]
    for row, one in enumerate(ones):
        above, line = table[-1], [GAP * (row + 1)]
        for column, other in enumerate(others):
            paired = above[column] + classes.cost(one, other)
            line.append(min(paired, above[column + 1] + GAP, line[column] + GAP))
        table.append(line)
    places, row, column = [], len(ones), len(others)
    while row and column:
        here = table[row][column]
        if here == table[row - 1][column - 1] + classes.cost(ones[row - 1], others[column - 1]):
            row, column = row - 1, column - 1
            places.append((row, column))
        elif here == table[row - 1][column] + GAP:
            row -= 1
        else:
            column -= 1
    return places[::-1]


def _lists(description: Description) -> dict[str, list[str]]:
    """The lists of blocks by their path, each in order."""
    lists: dict[str, list[str]] = {}
    for path in description.blocks:
        if path:
            lists.setdefault(path.rpartition(".")[0], []).append(path)
    return {path: sorted(blocks, key=_index) for path, blocks in lists.items()}


def _index(path: str) -> tuple[int, str]:
    leaf = path.rpartition(".")[2]
    return (int(leaf), "") if leaf.isdigit() else (0, leaf)


def _paired_lists(
    mine: Sequence[str], theirs: Sequence[str], pairs: BlockPairs
) -> Iterator[tuple[str, str]]:
    """Lists of one depth: those of one path, then what is left beneath the same block, in order."""
    wanted = {path: translated_path(path, pairs) for path in mine}
    found = {path: other for path, other in wanted.items() if other in theirs}
    yield from ((path, str(other)) for path, other in found.items())
    taken, there = set(found.values()), set(pairs.values())
    for path in mine:
        if path not in found:
            owner = pairs[innermost(path, pairs)]
            free = (p for p in theirs if p not in taken and innermost(p, there) == owner)
            other = next(free, None)
            if other is not None:
                taken.add(other)
                yield path, other


def innermost(path: str, blocks: Collection[str]) -> str:
    """The innermost of some blocks that a path lies in."""
    names = path.split(".")
    prefixes = (".".join(names[:end]) for end in range(len(names), 0, -1))
    return next((each for each in prefixes if each in blocks), "")
