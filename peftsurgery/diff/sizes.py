"""Numbers in a graph: nodes that are sizes of tensors, and what only reads others of them.

Where tokens are put before a text, everything behind it is asked for a length that is computed now
and was a constant before. That is one change and not one for every view.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from peftsurgery.diff.description import Node
from peftsurgery.diff.script import Edit


def size_keys(nodes: Mapping[str, Node], edits: Iterable[Edit]) -> set[str]:
    """The keys of all nodes that are numbers, of those there and of those that edits add."""
    added = {str(e.after): e.new for e in edits if e.before is None}
    found: set[str] = set()
    for key, node in {**nodes, **added}.items():
        inner = bool(node.operands) and all(operand in found for operand in node.operands)
        asked = node.op == "input" or node.op.startswith("sym_")
        if not node.shape and (asked or inner):
            found.add(key)
    return found


def is_resized(edit: Edit, sizes: Collection[str]) -> bool:
    """Whether an edit adds or removes a number, or has a node read others and nothing else."""
    old: Node | None = edit.old
    new: Node | None = edit.new
    if old is None or new is None:
        return (edit.after or edit.before) in sizes
    same = (old.op, old.module, old.surgery) == (new.op, new.module, new.surgery)
    tensors = ([key for key in each.operands if key not in sizes] for each in (old, new))
    return same and old.operands != new.operands and next(tensors) == next(tensors)
