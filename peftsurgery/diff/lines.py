"""lines: an edit script in the words of a reader, equal blocks folded into one line.

Each line has a sign (+ added, - removed, ~ changed, > renamed), so that colour is never needed.
Changes that only follow from another (what reads an inserted value, sizes behind a wider weight,
names in a block that moved) are counted in one line or left to the line they follow from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftsurgery.capture.names import is_within, join
from peftsurgery.diff.align import CALL
from peftsurgery.diff.description import Description, Insertion, Node, SiteFacts, TensorFacts
from peftsurgery.diff.names import folded
from peftsurgery.diff.script import Edit, GraphEdits, Script
from peftsurgery.diff.sizes import is_resized, size_keys


@dataclass(frozen=True)
class Line:
    """One change: at ``where``, which stands for ``count`` places of the model."""

    part: str
    sign: str
    where: str
    text: str
    count: int

    def __str__(self) -> str:
        times = f" ×{self.count}" if self.count > 1 else ""
        return f"{self.sign} {self.where or '(model)'}: {self.text}{times}"


# An unfolded line: part, sign, place, text.
Entry = tuple[str, str, str, str]
# Blocks that are called otherwise in the second model.
Moved = Sequence[tuple[str | None, str | None]]


def lines(script: Script, a: Description, b: Description) -> list[Line]:
    """All changes, the widest first: config, blocks, insertions, sites, operations, tensors."""
    moved = [(e.before, e.after) for e in script.blocks if e.before != e.after]
    operations = list(_operations(script.graphs, a))
    renamed = {where for _, sign, where, _ in operations if sign == ">"}
    entries = [
        *_config(script.config),
        *_blocks(script, a, b),
        *_insertions(script.insertions),
        *_sites(script.sites, moved),
        *_outermost(operations),
        *_tensors(script, moved, renamed),
        *_whole(script, a),
    ]
    return folded_lines(entries)


def folded_lines(entries: Iterable[Entry]) -> list[Line]:
    """Entries that say the same of places whose names differ in numbers as one line."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for part, sign, where, text in entries:
        groups.setdefault((part, sign, text), []).append(where)
    return [
        Line(part, sign, where, text, count)
        for (part, sign, text), places in groups.items()
        for where, count in folded(places)
    ]


def _config(edits: Iterable[Edit]) -> Iterator[Entry]:
    for edit in edits:
        name = f"config.{edit.before or edit.after}"
        if edit.before is None:
            yield "config", "+", name, str(edit.new)
        elif edit.after is None:
            yield "config", "-", name, str(edit.old)
        else:
            yield "config", "~", name, f"{edit.old} → {edit.new}"


def _blocks(script: Script, a: Description, b: Description) -> Iterator[Entry]:
    for edit in script.blocks:
        if edit.before is None and edit.after is not None:
            graphs = [script.graphs[number] for number in edit.new]
            size = sum(len(b.classes[label].nodes) for label in b.blocks[edit.after])
            yield "block", "+", edit.after, f"block {graphs[0].kind} ({size} nodes)"
        elif edit.after is None and edit.before is not None:
            size = sum(len(a.classes[label].nodes) for label in edit.old)
            yield "block", "-", edit.before, f"block {a.classes[edit.old[0]].kind} ({size} nodes)"
        elif edit.before is not None and edit.after is not None and edit.before != edit.after:
            yield "block", ">", edit.before, _moved(edit.before, edit.after)


def _moved(old: str, new: str) -> str:
    """Where a block is now, said alike for all that moved alike."""
    (old_list, _, one), (new_list, _, other) = old.rpartition("."), new.rpartition(".")
    if old_list == new_list and one.isdigit() and other.isdigit():
        return f"moved by {int(other) - int(one):+d}"
    return f"now in {new_list}" if one == other else f"now {new}"


def _insertions(edits: Iterable[Edit]) -> Iterator[Entry]:
    for edit in edits:
        old, new = edit.old, edit.new
        shown: Insertion = new if old is None else old
        where = shown.module
        if shown.parameters and not where:
            where = shown.parameters[0].rpartition(".")[0]
        if old is None:
            yield "insertion", "+", where, f"{new} on {new.role}"
        elif new is None:
            yield "insertion", "-", where, f"{old} on {old.role}"
        elif str(old) != str(new):
            yield "insertion", "~", where, f"{old} → {new} on {new.role}"


def _within(path: str, moved: Moved) -> bool:
    """Whether a path lies in a block that only one of the models has."""
    alone = [str(one or other) for one, other in moved if one is None or other is None]
    return any(is_within(path, block) for block in alone)


def _sites(edits: Iterable[Edit], moved: Moved) -> Iterator[Entry]:
    for edit in edits:
        name = str(edit.before or edit.after)
        path, _, rest = name.partition(" ")
        if rest.startswith("parameter") or _within(path, moved):
            continue  # the tensors say so, or the block that is new or gone does
        if edit.before is None:
            yield "site", "+", path, f"{rest} {edit.new.role}".strip()
        elif edit.after is None:
            yield "site", "-", path, f"{rest} {edit.old.role}".strip()
        elif edit.old != edit.new:
            yield "site", "~", path, f"{rest}: {_facts(edit.old, edit.new)}"


def _facts(old: SiteFacts, new: SiteFacts) -> str:
    pairs = [("role", old.role or "-", new.role or "-")] if old.role != new.role else []
    before, after = dict(old.facts), dict(new.facts)
    pairs += [
        (name, before.get(name, "-"), after.get(name, "-"))
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]
    return ", ".join(f"{name} {one} → {other}" for name, one, other in pairs)


def _operations(graphs: Iterable[GraphEdits], a: Description) -> Iterator[Entry]:
    for graph in graphs:
        if graph.before is None:
            continue
        told = list(_by_module(graph, size_keys(a.classes[graph.before].nodes, graph.edits)))
        for _, path in graph.places:
            yield from (("graph", sign, join(path, module), text) for module, sign, text in told)


def _by_module(graph: GraphEdits, sizes: Collection[str]) -> Iterator[tuple[str, str, str]]:
    """(module, sign, text) for what a shape class does otherwise, adapters' own doing left out.

    ``sizes`` are the keys of nodes that are numbers: what only reads others of these is told in the
    line of what is of another size.
    """
    surgery = {
        edit.after or edit.before: node.surgery or ("block" if node.op == CALL else "")
        for edit in graph.edits
        for node in [edit.old if edit.new is None else edit.new]
        if edit.before is None
        or edit.after is None
        or (node.op == CALL and "renamed" in edit.kinds)
    }
    found = [edit for edit in graph.edits if not _follows(edit, surgery)]
    resized = [edit for edit in found if is_resized(edit, sizes)]
    own = [edit for edit in found if not is_resized(edit, sizes)]
    modules: dict[str, list[Edit]] = {}
    for edit in own:
        shown = edit.old if edit.new is None else edit.new
        modules.setdefault(_owner(shown), []).append(edit)
    for module, edits in modules.items():
        for sign, text in _texts(edits):
            yield module, sign, text
    sized = [edit for edit in own if edit.kinds == ("reshaped",) and edit.new.op != "read"]
    sized += resized
    if sized:
        yield "", "~", f"{_counted(sized)} of another size"
    renamed = Counter(
        (edit.old.module, edit.new.module)
        for edit in own
        if "renamed" in edit.kinds and edit.new.op not in ("read", "input", "call")
    )
    for (old, new), _ in renamed.items():
        yield new, ">", _was(old)


def _outermost(entries: Sequence[Entry]) -> Iterator[Entry]:
    """Entries, but those of modules that are called otherwise only since what is around them is."""
    known = {(where, text) for _, sign, where, text in entries if sign == ">"}
    for part, sign, where, text in entries:
        names, before = where.split("."), text.removeprefix("was ").split(".")
        follows = False
        while sign == ">" and names and before and names.pop() == before.pop():
            follows = follows or (".".join(names), _was(".".join(before))) in known
        if not follows:
            yield part, sign, where, text


def _was(module: str) -> str:
    return f"was {module or 'in the block itself'}"


def _owner(node: Node) -> str:
    return node.module.rpartition(".")[0] if node.op == "read" else node.module


def _follows(edit: Edit, surgery: Mapping[str | None, str]) -> bool:
    """Whether an adapter made this: it put the node in or took it out, made it again, or feeds it.

    ``surgery`` names the adapter of each node that was added or removed; the call of a block that
    is new or gone, or has moved, is told with the block.
    """
    old: Node | None = edit.old
    new: Node | None = edit.new
    if old is None or new is None:
        return bool(surgery[edit.after or edit.before])
    if "redone" in edit.kinds:
        return True
    kinds = set(edit.kinds) - ({"renamed"} if new.op == CALL else set())
    if kinds != {"rewired"} or len(new.operands) != len(old.operands):
        return False
    changed = (pair for pair in zip(old.operands, new.operands, strict=True) if pair[0] != pair[1])
    return all(any(surgery.get(operand) for operand in pair) for pair in changed)


def _texts(edits: list[Edit]) -> Iterator[tuple[str, str]]:
    """(sign, text) for the edits of one module; reads are left to the tensors."""
    shown = [e for e in edits if (e.old if e.new is None else e.new).op != "read"]
    added = [edit for edit in shown if edit.before is None]
    removed = [edit for edit in shown if edit.after is None]
    if added:
        yield "+", _counted(added)
    if removed:
        yield "-", _counted(removed)
    for edit in shown:
        if "retyped" in edit.kinds:
            yield "~", f"{edit.old.op} → {edit.new.op}"
        elif "reset" in edit.kinds and "reshaped" not in edit.kinds:
            yield "~", f"{edit.new.op}{edit.old.form} → {edit.new.form}"
    rewired = [e for e in shown if "rewired" in e.kinds and not {"retyped", "reset"} & set(e.kinds)]
    if rewired:
        yield "~", f"other operands: {_names(rewired)}"


def _counted(edits: list[Edit]) -> str:
    count = len(edits)
    return f"{count} node{'s' if count > 1 else ''} ({_names(edits)})"


def _names(edits: list[Edit], limit: int = 6) -> str:
    ops = Counter((e.old if e.new is None else e.new).op for e in edits)
    names = [f"{op} ×{count}" if count > 1 else op for op, count in ops.items()]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if names[limit:] else "")


_WORDS: tuple[tuple[str, Callable[[TensorFacts, TensorFacts], str]], ...] = (
    ("reshaped", lambda old, new: f"{list(old.shape)} → {list(new.shape)}"),
    ("retyped", lambda old, new: f"{old.kind} → {new.kind}"),
)


def _tensors(script: Script, moved: Moved, renamed: Collection[str]) -> Iterator[Entry]:
    inserted = {
        name
        for edit in script.insertions
        for each in (edit.old, edit.new)
        if each is not None
        for name in each.parameters
    }
    told = set(inserted)
    ties = {
        (edit.old or edit.new).tied
        for edit in script.tensors
        if (edit.before is None or edit.after is None) and (edit.before or edit.after) in inserted
    }
    for part, sign, name, text, names in _divided(script.tensors):
        told.update(names)
        yield part, sign, name, text
    for edit in script.tensors:
        old, new = edit.old, edit.new
        name = str(edit.before or edit.after)
        if old is not None and new is not None:
            yield from _changed(edit, moved, renamed)
            continue
        shown = new if old is None else old
        if name not in told and shown.tied not in ties and not _within(name, moved):
            yield "tensor", "+" if old is None else "-", name, f"{shown.kind} {shown}"


def _divided(edits: Iterable[Edit]) -> Iterator[tuple[str, str, str, str, list[str]]]:
    """Tensors whose rows became those of several others in the same module, and the reverse."""
    sides: tuple[dict[Any, list[Edit]], dict[Any, list[Edit]]] = ({}, {})
    for edit in edits:
        if (edit.before is None) != (edit.after is None):
            tensor = edit.old or edit.new
            owner, _, leaf = str(edit.before or edit.after).rpartition(".")
            key = owner.rpartition(".")[0], leaf, tensor.dtype, tensor.shape[1:]
            sides[edit.before is None].setdefault(key, []).append(edit)
    for side, word in ((0, "split into"), (1, "made of")):
        for key, (first, *more) in sides[side].items():
            parts = sides[1 - side].get(key, [])
            whole = (first.old or first.new).shape[:1]
            rows = sum(sum((each.old or each.new).shape[:1]) for each in parts)
            if not more and len(parts) > 1 and whole and rows == whole[0]:
                names = [str(each.before or each.after) for each in (first, *parts)]
                leaves = ", ".join(name.split(".")[-2] for name in names[1:])
                yield "tensor", "~", names[0], f"{word} {leaves}", names


def _whole(script: Script, a: Description) -> Iterator[Entry]:
    """What became of tensors in both that is one line if it became of all: casts, training."""
    kept = [edit for edit in script.tensors if edit.before is not None and edit.after is not None]
    gone = {edit.before for edit in script.tensors if edit.after is None}
    there = [tensor for name, tensor in a.tensors.items() if name not in gone]
    casts: dict[tuple[str, str], list[str]] = {}
    for edit in kept:
        if "recast" in edit.kinds:
            casts.setdefault((edit.old.dtype, edit.new.dtype), []).append(str(edit.after))
    for (old, new), found in casts.items():
        free = sum(tensor.dtype == old for tensor in there)
        yield from _all_or_each(found, free, f"{old} → {new}", f"tensors that were {old}")
    for kind, was in (("frozen", True), ("trained", False)):
        found = [str(edit.after) for edit in kept if kind in edit.kinds]
        free = sum(tensor.kind == "parameter" and tensor.trained is was for tensor in there)
        yield from _all_or_each(found, free, kind, "parameters in both that were not")


def _all_or_each(names: Sequence[str], free: int, text: str, which: str) -> Iterator[Entry]:
    """One entry for all that it could be of, if there are several, else one for each."""
    if len(names) == free > 1:
        yield "tensor", "~", "", f"{text}: all {free} {which}"
    else:
        yield from (("tensor", "~", name, text) for name in names)


def _changed(edit: Edit, moved: Moved, renamed: Collection[str]) -> Iterator[Entry]:
    old, new, name = edit.old, edit.new, str(edit.after)
    for kind, text in _WORDS:
        if kind in edit.kinds:
            yield "tensor", "~", name, text(old, new)
    if "retied" in edit.kinds:
        apart = new.tied == edit.after
        yield "tensor", "~", name, "untied: a weight of its own" if apart else f"tied to {new.tied}"
    (owner, _, leaf), before = name.rpartition("."), str(edit.before)
    with_module = owner in renamed and before.rpartition(".")[2] == leaf
    if "renamed" in edit.kinds and not with_module and not _in_moved(before, name, moved):
        yield "tensor", ">", name, f"was {edit.before}"


def _in_moved(old: str, new: str, moved: Moved) -> bool:
    """Whether a name is another only because its block's is."""
    return any(
        one and old.startswith(f"{one}.") and new == f"{other}{old.removeprefix(str(one))}"
        for one, other in moved
    )
