"""diff: two captured models, and the :class:`Diff` that says what is different."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from peftsurgery.arguments import checked
from peftsurgery.capture import GraphModel, capture
from peftsurgery.capture.fingerprint import weights_of
from peftsurgery.diff.describing import describe
from peftsurgery.diff.description import Description
from peftsurgery.diff.figures import Figures, measure
from peftsurgery.diff.lines import folded_lines, lines
from peftsurgery.diff.markdown import markdown
from peftsurgery.diff.page import page
from peftsurgery.diff.script import Script, compare
from peftsurgery.diff.summary import Summary
from peftsurgery.diff.text import rendered
from peftsurgery.diff.weights import TensorChange, compare_weights, weight_entries
from peftsurgery.errors import SurgeryError
from peftsurgery.notebook import shown, table
from peftsurgery.surgery.loading import open_model


@dataclass(frozen=True)
class Diff:
    """What is different between two models; true if anything is."""

    names: tuple[str, str]
    a: Description
    b: Description
    figures: tuple[Figures, Figures]
    script: Script
    weights: Sequence[TensorChange] | None = None

    @cached_property
    def summary(self) -> Summary:
        """The difference as all formats show it: changes with equal blocks folded into one."""
        changes = lines(self.script, self.a, self.b)
        changes += folded_lines(weight_entries(self.weights or ()))
        return Summary(self.names, self.figures, changes, self.differs, self.weights)

    @property
    def differs(self) -> dict[str, bool]:
        """Whether structure, config and weights differ; weights that were not read do not."""
        script = self.script
        tables = (script.blocks, script.tensors, script.sites, script.insertions)
        weights = any(weight_entries(self.weights or ()))
        return {"structure": any(tables), "config": bool(script.config), "weights": weights}

    def __bool__(self) -> bool:
        return any(self.differs.values())

    def __str__(self) -> str:
        return rendered(self.summary, width=100)

    def to_dict(self) -> dict[str, Any]:
        """The difference as ``--json`` prints it."""
        return self.summary.to_dict()

    def to_markdown(self) -> str:
        """The difference for a pull request: a headline table and the changes by part."""
        return markdown(self.summary)

    def to_html(self, path: str | Path | None = None) -> str:
        """The difference as one page that works offline; written to ``path`` if that is given."""
        made = page(self.summary, self.b)
        if path is not None:
            Path(path).write_text(made, encoding="utf-8")
        return made

    def _repr_html_(self) -> str:
        rows = [(e.sign, e.where, e.text, e.count) for e in self.summary.lines]
        head = ("", "where", "what", "places")
        figures = table(("", "a", "b", "change"), self.summary.headline())
        heading = f"{self.names[0]} → {self.names[1]}: {self.summary.sentence()}"
        return shown(heading, figures, table(head, rows))


@checked
def diff(
    a: GraphModel | nn.Module | str | Path,
    b: GraphModel | nn.Module | str | Path,
    weights: bool = False,
    shape: tuple[int, int] | None = None,
) -> Diff:
    """What is different between two models.

    ``a`` and ``b`` are captured or operated models, models to capture, or what the command line
    takes for MODEL. An operated model is what it is with the adapters that are active now.
    ``weights`` compares the base's weights too, tensor by tensor, as they lie in files or in
    memory. ``shape`` is (batch, tokens) of the forward whose cost is counted, instead of the
    example that each model was captured with. Raises what opening and capturing raise, and PSG207
    if weights that are to be compared are not there.
    """
    names = _names(a, b)
    models = _opened(a), _opened(b)
    described = [describe(model) for model in models]
    figures = [measure(m, each, shape) for m, each in zip(models, described, strict=True)]
    first, second = described
    script = compare(first, second)
    changes = _weights(*models, script) if weights else None
    return Diff(names, first, second, (figures[0], figures[1]), script, changes)


def _weights(a: GraphModel, b: GraphModel, script: Script) -> list[TensorChange]:
    found = [weights_of(model.source) for model in (a, b)]
    for model, each in zip((a, b), found, strict=True):
        if each is None:
            raise SurgeryError("PSG207", f"{model.base_capture.top.kind} has no weights to compare")
    one, other = ({} if each is None else each.tensors for each in found)
    names = {str(edit.before): edit.after for edit in script.tensors if edit.before is not None}
    return compare_weights(one, other, names)


def _opened(model: GraphModel | nn.Module | str | Path) -> GraphModel:
    if isinstance(model, GraphModel):
        return model
    return capture(model) if isinstance(model, nn.Module) else open_model(str(model))


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
