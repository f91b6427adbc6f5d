"""overlay: one model, or two laid over each other, as the data of a page.

A graph of an overlay has the nodes of both models, each with a sign: ``+`` is in the second only,
``-`` in the first only, ``~`` is otherwise in the second, ``>`` is called otherwise; no sign is the
same in both. A part's first reading is the second model's; what it was in the first stands beside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from peftsurgery.diff.description import Description, Insertion, Node, SiteFacts, TensorFacts
from peftsurgery.diff.names import expanded
from peftsurgery.diff.script import Edit, GraphEdits, Script
from peftsurgery.diff.summary import Summary

SCHEMA = "peftsurgery.page/1"
Entry = dict[str, Any]


def overlay(
    after: Description, script: Script | None = None, before: Description | None = None
) -> Entry:
    """What a page shows of ``after``, and with ``script`` of what it was ``before``.

    ``graphs`` are those of the shape classes. A node's ``in`` are the places, in the same list, of
    the nodes it takes, ``was`` those it took. ``blocks`` say which graphs a path has ("" is the
    top), ``sites``, ``tensors`` and ``insertions`` what is where. Keys that say nothing are left
    out. Names are only added under one number of the schema.
    """
    if script is None or before is None:
        script, before = _nothing(after), after
    graphs, gone = _graphs_of_gone(script, before)
    rules: dict[tuple[str, ...], int] = {}
    return {
        "schema": SCHEMA,
        "kind": after.kind,
        "graphs": [_graph(each, before, after) for each in graphs],
        "blocks": [*_blocks(script, after), *gone],
        "tensors": list(_table(before.tensors, after.tensors, script.tensors, _tensor)),
        "sites": list(_sites(before, after, script)),
        "insertions": list(
            _table(
                before.insertions,
                after.insertions,
                script.insertions,
                lambda each: _insertion(each, rules),
            )
        ),
        "rules": [list(lines) for lines in rules],
    }


def told(summary: Summary, script: Script | None = None) -> list[Entry]:
    """The lines of a summary with the parts of the second model that they are about."""
    moved = {edit.before: edit.after for edit in script.blocks} if script else {}
    entries = []
    for line in summary.lines:
        at = expanded(line.where) if line.part != "config" else []
        if line.part == "block" and line.sign == ">":
            at = [str(moved.get(path, path)) for path in at]
        entries.append({**asdict(line), "at": at})
    return entries


def _nothing(model: Description) -> Script:
    """The script that makes a model of itself."""
    places: dict[str, list[tuple[str, str]]] = {label: [] for label in model.classes}
    for path, labels in model.blocks.items():
        for label in labels:
            places[label].append((path, path))
    return Script(
        tuple(
            GraphEdits(label, label, each.kind, (), tuple(places[label]))
            for label, each in model.classes.items()
        )
    )


def _graph(graph: GraphEdits, before: Description, after: Description) -> Entry:
    """A graph of both models; a key is the first one's, or ``+`` and the second one's."""
    nodes: dict[str, Node] = {}
    signs: dict[str, tuple[str, Node | None]] = {}
    if graph.before is not None:
        nodes |= before.classes[graph.before].nodes
    for edit in graph.edits:
        key = str(edit.before or edit.after)
        signs[key] = _sign(edit), edit.old if edit.new is not None else None
        nodes[key] = edit.old if edit.new is None else edit.new
    place = {key: number for number, key in enumerate(nodes)}
    after_keys = {one: other for other, one in graph.keys.items()}
    shown = [
        _node(key, node, place, *signs.get(key, ("", None)), after_keys.get(key, key))
        for key, node in nodes.items()
    ]
    types = (after.classes.get(graph.after) or before.classes[graph.after]).types
    return {"kind": graph.kind, "types": dict(types), "nodes": shown}


def _node(
    key: str, node: Node, place: Mapping[str, int], sign: str, old: Node | None, after: str
) -> Entry:
    inner = [place[each] for each in node.operands]
    entry: Entry = {
        "key": key,
        "op": node.op,
        "module": node.module,
        "in": inner,
        "form": node.form,
        "shape": node.shape,
        "code": node.code,
        "by": node.surgery,
        "sign": sign,
        "after": after if after != key else "",
    }
    if old is not None:
        taken = [place[each] for each in old.operands]
        changed = ("op", "module", "form", "shape")
        entry["old"] = {k: v for k in changed if (v := getattr(old, k)) != entry[k]}
        entry["was"] = taken if taken != inner else None
    return _given(entry)


def _sign(edit: Edit) -> str:
    if edit.before is None:
        return "+"
    if edit.after is None:
        return "-"
    return ">" if edit.kinds == ("renamed",) else "~"


def _graphs_of_gone(script: Script, before: Description) -> tuple[list[GraphEdits], list[Entry]]:
    """The graphs of a script with those of blocks that are gone, and these blocks."""
    graphs, numbers, blocks = list(script.graphs), dict[str, int](), []
    for edit in script.blocks:
        if edit.after is None:
            for label in edit.old:
                if label not in numbers:
                    numbers[label] = len(graphs)
                    graphs.append(GraphEdits(label, label, before.classes[label].kind, ()))
            mine = [numbers[label] for label in edit.old]
            blocks.append({"path": edit.before, "graphs": mine, "sign": "-"})
    return graphs, blocks


def _blocks(script: Script, after: Description) -> Iterator[Entry]:
    """The blocks of the second model."""
    edits = {edit.after: edit for edit in script.blocks if edit.after is not None}
    graphs: dict[str, list[int]] = {}
    for number, graph in enumerate(script.graphs):
        for _, path in graph.places:
            graphs.setdefault(path, []).append(number)
    for path in after.blocks:
        edit = edits.get(path)
        numbers = graphs.get(path, []) if edit is None else list(edit.new)
        was = None if edit is None or edit.before == path else edit.before
        sign = "" if edit is None else _sign(edit)
        yield _given({"path": path, "graphs": numbers, "sign": sign, "was": was})


def _sites(before: Description, after: Description, script: Script) -> Iterator[Entry]:
    """All sites but the parameters of another site's module, which its tensors say."""
    for entry in _table(before.sites, after.sites, script.sites, _site):
        if entry["kind"] != "parameter":
            yield entry


def _table(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    edits: Sequence[Edit],
    shown: Any,
) -> Iterator[Entry]:
    """The entries of a table in both models, each with its sign and what it was."""
    changed = {edit.after: edit for edit in edits if edit.after is not None}
    for name, value in after.items():
        entry = {"name": name, **shown(value)}
        edit = changed.get(name)
        if edit is not None:
            entry["sign"] = _sign(edit)
            entry["was"] = edit.before if edit.before not in (None, name) else None
            old = {} if edit.old is None else shown(edit.old)
            entry["old"] = {k: v for k, v in old.items() if v != entry.get(k)}
        yield _given(entry)
    for edit in edits:
        if edit.after is None:
            yield _given({"name": edit.before, **shown(edit.old), "sign": "-"})


def _tensor(tensor: TensorFacts) -> Entry:
    return {
        "text": str(tensor),
        "kind": tensor.kind,
        "trained": tensor.trained,
        "tied": tensor.tied,
    }


def _site(site: SiteFacts) -> Entry:
    facts, bindings = dict(site.facts), dict(site.bindings)
    return {"kind": site.kind, "role": site.role, "facts": facts, "bindings": bindings}


def _insertion(insertion: Insertion, rules: dict[tuple[str, ...], int]) -> Entry:
    rule = rules.setdefault(insertion.rule, len(rules))
    return {
        "adapter": str(insertion),
        "module": insertion.module,
        "role": insertion.role,
        "parameters": list(insertion.parameters),
        "rule": rule,
    }


def _given(entry: Entry) -> Entry:
    """An entry without what says nothing."""
    return {k: v for k, v in entry.items() if v not in ("", None, [], {})}
