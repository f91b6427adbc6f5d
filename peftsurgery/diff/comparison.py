"""diff: two models or two files, and the :class:`Diff` that says what is different."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from peftsurgery.arguments import checked
from peftsurgery.capture import GraphModel, capture
from peftsurgery.diff.description import Description
from peftsurgery.diff.files import are_files, compare_files
from peftsurgery.diff.lines import folded_lines, lines
from peftsurgery.diff.markdown import markdown
from peftsurgery.diff.onnx_graph import is_onnx
from peftsurgery.diff.operations import LEFT_OUT, Entry, count_operations, operation_entries
from peftsurgery.diff.page import page
from peftsurgery.diff.script import Script, compare
from peftsurgery.diff.side import Side, comparable, side_of_model, side_of_onnx
from peftsurgery.diff.summary import Summary
from peftsurgery.diff.text import rendered
from peftsurgery.diff.weights import TensorChange, compare_weights, weight_entries
from peftsurgery.files import write_whole
from peftsurgery.notebook import shown, table
from peftsurgery.surgery.loading import open_model

COMPARED = "inputs, outputs, tensors and kinds of operations"


@dataclass(frozen=True)
class Diff:
    """What is different between two models, true if anything is.

    ``script`` makes the second one's description of the first one's, ``models``; both are None
    for files, which have no graph.
    """

    summary: Summary
    models: tuple[Description, Description] | None = None
    script: Script | None = None

    def __bool__(self) -> bool:
        return any(self.summary.differs.values())

    def __str__(self) -> str:
        return rendered(self.summary, width=100)

    def named(self, a: str, b: str) -> Diff:
        """The same difference, with the two models called ``a`` and ``b`` in what it prints."""
        return replace(self, summary=replace(self.summary, names=(a, b)))

    def to_dict(self) -> dict[str, Any]:
        """The difference as ``--json`` prints it."""
        return self.summary.to_dict()

    def to_markdown(self) -> str:
        """The difference for a pull request: a headline table and the changes by part."""
        return markdown(self.summary)

    def to_html(self, path: str | Path | None = None) -> str:
        """The difference as one page that works offline; written to ``path`` if that is given.

        PSG603 if it cannot be written there.
        """
        made = page(self.summary, self.models, self.script)
        if path is not None:
            write_whole(Path(path).parent, {Path(path).name: made.encode()})
        return made

    def _repr_html_(self) -> str:
        rows = [(e.sign, e.where, e.text, e.count) for e in self.summary.lines]
        head = ("", "where", "what", "places")
        figures = table(("", "a", "b", "change"), self.summary.headline())
        heading = f"{' → '.join(self.summary.names)}: {self.summary.sentence()}"
        return shown(heading, figures, table(head, rows))


@checked
def diff(
    a: GraphModel | nn.Module | str | Path,
    b: GraphModel | nn.Module | str | Path,
    weights: bool = False,
    shape: tuple[int, int] | None = None,
) -> Diff:
    """What is different between two models, two rule files or two safetensors files.

    Rule files may be named as they are shipped.

    ``a`` and ``b`` are captured or operated models, models to capture, what the command line takes
    for MODEL, or ONNX files. An operated model is what it is with the adapters that are active now;
    an ONNX file is compared with a model of torch by inputs, outputs, tensors, and how often each
    module does what (products, attention cores, norms, activations, sums of streams), since ONNX
    has operators of its own. ``weights`` compares the base's weights too, tensor by tensor, as they
    lie in files or in memory, or as active adapters trained them. ``shape`` is (batch, tokens) of
    the forward whose cost is counted, instead of the example that each model was captured with.
    Raises what opening and capturing raise, PSG207 if weights that are to be compared are not
    there, PSG905 for a file beside a model, and PSG222 for an ONNX file that is damaged.
    """
    paths = [each for each in (a, b) if isinstance(each, str | Path) and not is_onnx(each)]
    if len(paths) == 2 and are_files(*paths):
        return Diff(compare_files(Path(paths[0]), Path(paths[1]), weights))
    one, other = comparable(*(_side(each, shape) for each in (a, b)))
    first, second = one.description, other.description
    script = compare(first, second)
    changes = _weights(one, other, script) if weights else None
    changed = folded_lines(weight_entries(changes or ()))
    operations = [] if one.is_whole else folded_lines(_operations(one, other))
    tables = (script.blocks, script.tensors, script.sites, script.insertions)
    differs = {
        "structure": any(tables) or bool(operations),
        "config": bool(script.config),
        "weights": bool(changed),
    }
    told = [*lines(script, first, second), *operations, *changed]
    limits = ("", "") if one.is_whole else (COMPARED, LEFT_OUT)
    figures = one.figures, other.figures
    summary = Summary(_names(a, b), figures, told, differs, changes, *limits)
    return Diff(summary, (first, second), script)


def _side(model: GraphModel | nn.Module | str | Path, shape: tuple[int, int] | None) -> Side:
    if is_onnx(model):
        return side_of_onnx(Path(str(model)))
    if not isinstance(model, GraphModel):
        model = capture(model) if isinstance(model, nn.Module) else open_model(str(model))
    return side_of_model(model, shape)


def _operations(one: Side, other: Side) -> Iterator[Entry]:
    counted = (count_operations(side.nodes()) for side in (one, other))
    return operation_entries(*counted)


def _weights(one: Side, other: Side, script: Script) -> list[TensorChange]:
    names = {str(edit.before): edit.after for edit in script.tensors if edit.before is not None}
    return compare_weights(one.values(), other.values(), names)


def _names(a: Any, b: Any) -> tuple[str, str]:
    """What the two are called in the output: their paths, or what they are."""
    first, second = (_name(each) for each in (a, b))
    return (first, second) if first != second else (f"{first} (a)", f"{second} (b)")


def _name(model: Any) -> str:
    if isinstance(model, str | Path):
        return str(model)
    if not isinstance(model, GraphModel):
        return type(model).__name__
    adapters = getattr(model, "active", ())
    kind = model.base_capture.top.kind
    return f"{kind} with {', '.join(adapters)}" if adapters else kind
