"""Rewriting of a capture: one new program for all blocks of a class that are cut alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from peftsurgery.capture import Capture, Program
from peftsurgery.capture.copying import SharedByCopies
from peftsurgery.capture.idle_masks import without_idle_masks
from peftsurgery.capture.names import join
from peftsurgery.surgery.fourbit.pack import PackedWeight
from peftsurgery.surgery.fourbit.read import read_packed
from peftsurgery.surgery.plan.cut import Cut, in_order
from peftsurgery.surgery.rewrite.batch_axis import batches
from peftsurgery.surgery.rewrite.inputs import changes_inputs, plan_inputs
from peftsurgery.surgery.rewrite.optimise import optimised
from peftsurgery.surgery.rewrite.program import Walk
from peftsurgery.surgery.rewrite.row_form import row_form
from peftsurgery.surgery.rewrite.rows import RowChoice, RowWalk, check_lengths, pass_rows


@dataclass(frozen=True)
class Edits:
    """All changes of one program, applied together.

    ``calls`` are the new labels of the inner programs that it calls, by the name of the call;
    ``stored`` the packed weights that it reads, ``moved`` the names under which it finds other
    parameters than those that it says; with ``choice`` the rows choose among the cuts.
    """

    cuts: Sequence[Cut]
    calls: Mapping[str, str]
    stored: Mapping[str, PackedWeight]
    moved: Mapping[str, str]
    choice: RowChoice | None

    @property
    def is_nothing(self) -> bool:
        """Whether the program is unchanged."""
        passes_rows = self.choice is not None and self.choice.is_top
        return not (self.cuts or self.calls or self.stored or self.moved or passes_rows)

    @property
    def key(self) -> tuple[Any, ...]:
        """Hashable identity of the edits: equal for programs that become the same."""
        done = tuple(cut.done for cut in self.cuts)
        maps = (self.calls, self.stored, self.moved)
        return (done, *(tuple(each.items()) for each in maps), self.choice)

    @property
    def adapters(self) -> str:
        """The adapters that take part."""
        names = [cut.operation.name for cut in self.cuts]
        names += [stored.adapter for stored in self.stored.values()]
        if self.moved and not names:
            return "base"  # what another adapter trains is read as the base has it
        return ("+" if self.choice is None else "|").join(dict.fromkeys(names))


@dataclass(frozen=True)
class Rewrites(SharedByCopies):
    """Cache of a model's rewritten programs, shared by all of its captures.

    ``exact`` ones are run as the rules say, others in their running form (:mod:`.optimise`).
    """

    exact: bool = False
    made: dict[Any, Program] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)

    def capture(
        self,
        source: Capture,
        cuts: Sequence[Cut],
        rows: Sequence[str] | None = None,
        stored: Mapping[str, PackedWeight] | None = None,
        moved: Mapping[str, str] | None = None,
    ) -> Capture:
        """Rewrite a capture: inner blocks first, since their callers name their programs.

        With ``rows``, the names of adapters, the rows of a batch choose among them, and the
        programs take one input more: the number of each row's adapter. ``stored`` are the weights,
        by name, that the model keeps packed, ``moved`` the names that parameters have instead of
        their own.
        """
        if rows is not None:
            check_lengths(cuts)
        by_block: dict[tuple[str, Program], list[Cut]] = {}
        for cut in cuts:
            by_block.setdefault((cut.placed.block, cut.placed.program), []).append(cut)
        programs: dict[str, tuple[Program, ...]] = {}
        renamed: dict[tuple[str, str], str] = {}
        choice = {} if rows is None else _choices(source, rows)
        for path in sorted(source.programs, key=lambda path: (-path.count("."), path == "")):
            for program in source.programs[path]:
                edits = Edits(
                    by_block.get((path, program), []),
                    _renamed_calls(path, program, renamed),
                    _read_by(path, program, stored or {}),
                    _moved_in(path, program, moved or {}),
                    choice.get((path, program)),
                )
                new = self.program(program, edits)
                renamed[path, program.label] = new.label
                programs[path] = (*programs.get(path, ()), new)
        ordered = {path: programs[path] for path in source.programs}
        return replace(source, programs=without_idle_masks(ordered))

    def program(self, program: Program, edits: Edits) -> Program:
        """Rewrite a program, or look it up; the same object if nothing changes."""
        if edits.is_nothing:
            return program
        key = (program, *edits.key)
        if key not in self.made:
            self.made[key] = self.rewrite(program, edits)
        return self.made[key]

    def rewrite(self, program: Program, edits: Edits) -> Program:
        """Rewrite a program; its label names the adapters."""
        graph = rewritten_graph(program, edits.cuts, edits.choice)
        read_packed(graph, edits.stored)
        for node in graph.find_nodes(op="get_attr"):
            node.target = edits.moved.get(str(node.target), node.target)
        for node in graph.find_nodes(op="call_module"):
            if node.name in edits.calls:
                node.kwargs = {**node.kwargs, "program": edits.calls[node.name]}
                if edits.choice is not None:
                    pass_rows(node)
        label = "+".join(filter(None, (program.label, edits.adapters)))
        number = self.labels.get(label, 0)
        self.labels[label] = number + 1
        running = None
        if not self.exact:
            running = optimised(graph) if edits.choice is None else row_form(graph)
        return program.rewritten(f"{label}.{number}" if number else label, graph, running)


def _choices(source: Capture, adapters: Sequence[str]) -> dict[tuple[str, Program], RowChoice]:
    """Row choices by program: adapters and the batch's position."""
    known = batches(source)
    return {
        (path, program): RowChoice(tuple(adapters), known.get((path, program)), path == "")
        for path, programs in source.programs.items()
        for program in programs
    }


def _renamed_calls(
    path: str, program: Program, renamed: Mapping[tuple[str, str], str]
) -> dict[str, str]:
    """Renamed programs that a program calls, by the call's node."""
    calls = {}
    for node in program.graph.find_nodes(op="call_module"):
        label = str(node.kwargs["program"])
        new = renamed[join(path, str(node.target)), label]
        if new != label:
            calls[node.name] = new
    return calls


def rewritten_graph(
    program: Program, cuts: Sequence[Cut], choice: RowChoice | None = None
) -> fx.Graph:
    """Rewrite a program's graph: make the cuts in order, those of the inputs last.

    What else is done to the embeddings is done to those of the text alone. With ``choice`` each cut
    is for the rows of its adapter, and the graph takes one input more. Raises PSG305, PSG313.
    """
    walk = Walk(program) if choice is None else RowWalk(program, choice)
    for cut in sorted(in_order(cuts), key=changes_inputs):
        plan_inputs(walk, cut) if changes_inputs(cut) else walk.plan(cut)
    return walk.run()


def _read_by(
    path: str, program: Program, stored: Mapping[str, PackedWeight]
) -> dict[str, PackedWeight]:
    """The packed weights that a block's program reads, by their names in it."""
    nodes = program.graph.find_nodes(op="get_attr") if stored else ()
    names = dict.fromkeys(str(node.target) for node in nodes)
    return {name: stored[join(path, name)] for name in names if join(path, name) in stored}


def _moved_in(path: str, program: Program, moved: Mapping[str, str]) -> dict[str, str]:
    """Renamed parameters that a block's program reads, by their names within the block."""
    nodes = program.graph.find_nodes(op="get_attr") if moved else ()
    read = {join(path, str(node.target)) for node in nodes}
    above = f"{path}." if path else ""
    here = {name: now for name, now in moved.items() if name in read or now in read}
    return {name.removeprefix(above): now.removeprefix(above) for name, now in here.items()}
