"""The edit script: what makes one description of another, applied and taken back as data.

:func:`compare` writes it, :func:`follow` applies it. Nodes keep the keys that they have in the
first model; those that it has not are called ``+`` and their key in the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from graphlib import TopologicalSorter
from typing import Any

from peftsurgery.capture.names import join
from peftsurgery.diff.align import CALL, Pairs, align
from peftsurgery.diff.blocks import BlockPairs, Classes, align_blocks
from peftsurgery.diff.description import Description, Insertion, Node, ShapeClass, TensorFacts
from peftsurgery.diff.names import Renaming


@dataclass(frozen=True)
class Edit:
    """One change of a table: ``before`` and ``after`` are the names, ``old`` and ``new`` values.

    ``kinds`` are words of: added, removed, renamed, rewired, retyped, reset (other constants),
    redone (by an adapter), reshaped, recast, retied, trained, frozen, changed.
    """

    kinds: tuple[str, ...]
    before: str | None
    after: str | None
    old: Any
    new: Any


@dataclass(frozen=True)
class GraphEdits:
    """What makes one shape class of another; of nothing, if ``before`` is None."""

    before: str | None
    after: str
    kind: str
    edits: tuple[Edit, ...]
    places: tuple[tuple[str, str], ...] = ()
    """The blocks of both models that these edits are made in."""
    keys: Mapping[str, str] = field(default_factory=dict, compare=False)
    """What the second model calls a node, and what the first one calls it."""


@dataclass(frozen=True)
class Script:
    """All edits. Those of blocks have the numbers of their graph edits as values."""

    graphs: tuple[GraphEdits, ...] = ()
    blocks: tuple[Edit, ...] = ()
    tensors: tuple[Edit, ...] = ()
    sites: tuple[Edit, ...] = ()
    insertions: tuple[Edit, ...] = ()
    config: tuple[Edit, ...] = ()

    def __bool__(self) -> bool:
        edited = any(each.edits for each in self.graphs)
        tables = (self.blocks, self.tensors, self.sites, self.insertions, self.config)
        return edited or any(tables)


def compare(a: Description, b: Description) -> Script:
    """The edits that make ``b`` of ``a``."""
    pairs = align_blocks(a, b)
    graphs, blocks = _graph_edits(a, b, pairs)
    renaming = _renaming(a, b, pairs, graphs)
    tensors = {name: renaming.tensor(name) for name in a.tensors}
    found = {
        "tensors": _table(a.tensors, b.tensors, tensors, _tensor_kinds(tensors)),
        "sites": _table(a.sites, b.sites, {k: renaming.site(k) for k in a.sites}),
        "insertions": _table(
            a.insertions,
            b.insertions,
            {k: renaming.site(k) for k in a.insertions},
            _insertion_kinds(renaming),
        ),
        "config": _table(a.config, b.config, {k: k for k in a.config}),
    }
    return Script(tuple(each for each, _ in graphs), blocks, **found)


def follow(a: Description, script: Script, kind: str) -> Description:
    """The description that a script makes of ``a``; ``kind`` is the model's class then."""
    classes = dict(a.classes)
    labels = []
    for number, each in enumerate(script.graphs):
        if each.before is not None and not each.edits:
            labels.append(each.before)
            continue
        start = {} if each.before is None else a.classes[each.before].nodes
        labels.append(f"{number}: {each.after}")
        classes[labels[-1]] = ShapeClass(each.kind, _edited(start, each.edits))
    blocks = dict(a.blocks)
    for edit in script.blocks:
        if edit.before is not None:
            del blocks[edit.before]
    for edit in script.blocks:
        if edit.after is not None:
            blocks[edit.after] = tuple(labels[number] for number in edit.new)
    used = {label for several in blocks.values() for label in several}
    tables = {
        name: _followed(getattr(a, name), getattr(script, name))
        for name in ("tensors", "sites", "insertions", "config")
    }
    kept = {label: each for label, each in classes.items() if label in used}
    return Description(kind, kept, blocks, **tables)


def _followed(table: Mapping[str, Any], edits: tuple[Edit, ...]) -> dict[str, Any]:
    gone = {edit.before for edit in edits}
    kept = {name: value for name, value in table.items() if name not in gone}
    return kept | {edit.after: edit.new for edit in edits if edit.after is not None}


def _edited(nodes: Mapping[str, Node], edits: tuple[Edit, ...]) -> dict[str, Node]:
    made = _followed(nodes, edits)
    order = TopologicalSorter({key: node.operands for key, node in made.items()})
    return {key: made[key] for key in order.static_order()}


def _graph_edits(
    a: Description, b: Description, pairs: BlockPairs
) -> tuple[list[tuple[GraphEdits, Pairs]], tuple[Edit, ...]]:
    """The edits of every pair of shape classes, and those of the blocks."""
    classes = Classes(a, b)
    by_form = {form: label for label, form in classes.forms[0].items()}
    origin = {other: one for one, other in pairs.items() if other in b.blocks}
    numbers: dict[tuple[str | None, str], int] = {}
    graphs: list[tuple[GraphEdits, Pairs]] = []
    places: list[list[tuple[str, str]]] = []
    edits: list[Edit] = []
    for path, labels in b.blocks.items():
        one = origin.get(path)
        mine = () if one is None else a.blocks[one]
        used = []
        for place, label in enumerate(labels):
            start = mine[place] if place < len(mine) else by_form.get(classes.forms[1][label])
            if (start, label) not in numbers:
                numbers[start, label] = len(graphs)
                graphs.append(_compared(a, b, start, label, pairs, (one or path, path)))
                places.append([])
            used.append(numbers[start, label])
            if one is not None:
                places[used[-1]].append((one, path))
        changed = any(graphs[number][0].edits for number in used) or len(mine) != len(labels)
        if one is None or one != path or changed:
            kinds = _block_kinds(one, path, changed)
            edits.append(Edit(kinds, one, path, mine, tuple(used)))
    gone = (path for path in a.blocks if path not in pairs)
    edits += [Edit(("removed",), path, None, a.blocks[path], ()) for path in gone]
    placed = [
        (replace(each, places=tuple(where)), found)
        for (each, found), where in zip(graphs, places, strict=True)
    ]
    return placed, tuple(edits)


def _block_kinds(one: str | None, path: str, changed: bool) -> tuple[str, ...]:
    if one is None:
        return ("added",)
    return (*(["renamed"] if one != path else []), *(["changed"] if changed else []))


def _compared(
    a: Description,
    b: Description,
    start: str | None,
    label: str,
    blocks: BlockPairs,
    place: tuple[str, str],
) -> tuple[GraphEdits, Pairs]:
    """The edits of one shape class to another, as they are made at a place in both models."""
    target = b.classes[label]
    nodes = {} if start is None else a.classes[start].nodes
    pairs = align(_called_as(nodes, place[0], blocks), _called_as(target.nodes, place[1], None))
    back = {other: one for one, other in pairs.items()}
    edits = list(_node_edits(nodes, target.nodes, back))
    edits += [Edit(("removed",), k, None, nodes[k], None) for k in nodes if k not in pairs]
    return GraphEdits(start, label, target.kind, tuple(edits), keys=back), pairs


def _called_as(
    nodes: Mapping[str, Node], block: str, pairs: BlockPairs | None
) -> Mapping[str, Node]:
    """Nodes whose calls are told apart by the block they call, as the second model names it.

    A call of a block that is gone is like no other.
    """
    calls = {}
    for key, node in nodes.items():
        if node.op == CALL:
            path = join(block, node.module)
            other = path if pairs is None else pairs.get(path)
            name = f"{CALL} {other}" if other is not None else f"{CALL} of nothing in {path}"
            calls[key] = replace(node, op=name, module="")
    return {**nodes, **calls}


def _node_edits(
    a: Mapping[str, Node], b: Mapping[str, Node], back: Mapping[str, str]
) -> Iterator[Edit]:
    for key, node in b.items():
        operands = tuple(back.get(each, f"+{each}") for each in node.operands)
        new = replace(node, operands=operands)
        one = back.get(key)
        if one is None:
            yield Edit(("added",), None, f"+{key}", None, new)
        elif a[one] != new:
            yield Edit(_node_kinds(a[one], new), one, one, a[one], new)


def _node_kinds(old: Node, new: Node) -> tuple[str, ...]:
    found = {
        "retyped": old.op != new.op,
        "renamed": old.module != new.module or (old.op == "input" and old.form != new.form),
        "redone": old.surgery != new.surgery,
        "rewired": old.operands != new.operands,
        "reset": old.form != new.form and "input" not in (old.op, new.op),
        "reshaped": old.shape != new.shape,
    }
    return tuple(kind for kind, holds in found.items() if holds)


def _renaming(
    a: Description, b: Description, pairs: BlockPairs, graphs: list[tuple[GraphEdits, Pairs]]
) -> Renaming:
    """How the names of ``a`` read in ``b``: by block, by what reads them, by themselves."""
    renaming = Renaming(pairs, frozenset(path for path in a.blocks if path not in pairs))
    for each, found in graphs:
        if each.before is None:
            continue
        old, new = a.classes[each.before].nodes, b.classes[each.after].nodes
        for one, other in found.items():
            for place in each.places:
                renaming.learn(place, old[one], new[other])
    return renaming


def _table(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    names: Mapping[str, str | None],
    kinds: Any = None,
) -> tuple[Edit, ...]:
    """The edits of a table whose entries are called otherwise in the second one."""
    edits, seen = [], set()
    for name, value in old.items():
        other = names[name]
        if other is None or other not in new or other in seen:
            edits.append(Edit(("removed",), name, None, value, None))
            continue
        seen.add(other)
        found = ("renamed",) if name != other else ()
        if value != new[other]:
            found += ("changed",) if kinds is None else kinds(value, new[other])
        if name != other or value != new[other]:
            edits.append(Edit(found, name, other, value, new[other]))
    edits += [Edit(("added",), None, k, None, v) for k, v in new.items() if k not in seen]
    return tuple(edits)


def _tensor_kinds(names: Mapping[str, str | None]) -> Any:
    def kinds(old: TensorFacts, new: TensorFacts) -> tuple[str, ...]:
        found = {
            "reshaped": old.shape != new.shape,
            "recast": old.dtype != new.dtype,
            "retyped": old.kind != new.kind,
            "retied": names.get(old.tied) != new.tied,
            "trained": new.trained and not old.trained,
            "frozen": old.trained and not new.trained,
        }
        return tuple(kind for kind, holds in found.items() if holds)

    return kinds


def _insertion_kinds(renaming: Renaming) -> Any:
    def kinds(old: Insertion, new: Insertion) -> tuple[str, ...]:
        moved = replace(
            old,
            module=renaming.path(old.module) or "",
            parameters=tuple(renaming.tensor(name) or "" for name in old.parameters),
        )
        return () if moved == new else ("changed",)

    return kinds
