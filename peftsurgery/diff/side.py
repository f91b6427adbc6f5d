"""Side: one of two models that are compared, captured or read from an ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import fx

from peftsurgery.capture import GraphModel
from peftsurgery.capture.fingerprint import in_memory, weights_of
from peftsurgery.diff.describing import describe_model, served, shape_of_value
from peftsurgery.diff.description import Description, Node, SiteFacts, TensorFacts
from peftsurgery.diff.figures import Figures, measure
from peftsurgery.diff.flat import flattened
from peftsurgery.diff.onnx_graph import read_onnx
from peftsurgery.errors import SurgeryError
from peftsurgery.fingerprint import Sampled
from peftsurgery.surgery.model.operated import OperatedModel


@dataclass(frozen=True)
class Side:
    """A model's description and figures, and what gives its tensors' values by name.

    ``nodes`` gives those of the whole graph, in order. ``inputs`` are the shapes of the inputs by
    name, ``outputs`` those of the outputs in order. ``origins`` are the names in the file of
    tensors that have other names in the description, and ``unsaved`` tensors that the model has,
    but no file of it. ``operators`` names whose they are; the description of a side that is not
    whole has no graph.
    """

    description: Description
    figures: Figures
    values: Callable[[], Mapping[str, Sampled]]
    nodes: Callable[[], Mapping[str, Node]]
    inputs: Mapping[str, str]
    outputs: tuple[str, ...]
    operators: str
    origins: Mapping[str, str]
    unsaved: frozenset[str] = frozenset()
    is_whole: bool = True


def side_of_model(model: GraphModel, shape: tuple[int, int] | None = None) -> Side:
    """A captured model; ``shape`` is (batch, tokens) of the forward whose cost is counted."""
    description, graph = describe_model(model), served(model).top.graph
    inputs = zip(served(model).names, graph.find_nodes(op="placeholder"), strict=False)
    outputs: list[fx.Node] = []
    fx.map_arg(graph.output_node().args, outputs.append)

    def values() -> Mapping[str, Sampled]:
        weights = weights_of(model.source)
        if weights is None:
            raise SurgeryError("PSG207", f"{description.kind} has no weights to compare")
        return {**weights.tensors, **_trained(model)}

    return Side(
        description,
        measure(model, description, shape),
        values,
        lambda: flattened(served(model), description.classes),
        {name: shape_of_value(node) for name, node in inputs if shape_of_value(node)},
        tuple(map(shape_of_value, outputs)),
        "torch",
        {},
        frozenset(name for name, _ in model.named_buffers()) - description.tensors.keys(),
    )


def _trained(model: GraphModel) -> dict[str, Sampled]:
    """What the active adapters made of the base's own tensors, by the base's names."""
    if not isinstance(model, OperatedModel) or not model.trained:
        return {}
    model.learnt()  # copies of a base that was not read yet are filled
    return {name: in_memory(model.dense(name)) for name in model.trained}


def side_of_onnx(path: Path) -> Side:
    """An ONNX file. Raises what :func:`read_onnx` raises."""
    graph = read_onnx(path)
    inputs, outputs = graph.ends
    nodes = graph.description.classes["0"].nodes
    return Side(
        graph.description,
        graph.figures,
        lambda: graph.values,
        lambda: nodes,
        inputs,
        outputs,
        "ONNX",
        graph.origins,
    )


def comparable(one: Side, other: Side) -> tuple[Side, Side]:
    """Two sides as they can be compared: whole, or what is at their ends.

    Those are inputs, outputs and tensors, where the operators are of two libraries; what these do
    is counted beside (:mod:`peftsurgery.diff.operations`).
    """
    if one.operators == other.operators:
        return one, other
    return _ends(one, other), _ends(other, one)


def _ends(side: Side, other: Side) -> Side:
    """A side without what is between its inputs and its outputs."""
    sites = {f"{name} input": _fact("input", shape) for name, shape in side.inputs.items()}
    for number, shape in enumerate(side.outputs):
        sites[f" output {number}"] = _fact("output", shape)
    description = Description(
        side.description.kind,
        tensors={name: _plain(name, side) for name in _names(side, other)},
        sites=sites,
    )

    def values() -> Mapping[str, Sampled]:
        found = side.values()
        return {n: v for n, v in found.items() if n not in side.origins or n in description.tensors}

    return replace(side, description=description, values=values, is_whole=False)


def _names(side: Side, other: Side) -> list[str]:
    """The names that tensors are compared by: of several for one tensor those that ``other`` has.

    One that ``other`` has none of goes by its first, unless a file of ``other`` would not have it.
    """
    kept = [name for name in side.description.tensors if name in other.description.tensors]
    known = {side.origins.get(name, name) for name in kept}
    for name in side.description.tensors:
        origin = side.origins.get(name, name)
        if origin not in known and name not in other.unsaved:
            known.add(origin)
            kept.append(name)
    return kept


def _fact(kind: str, shape: str) -> SiteFacts:
    return SiteFacts(kind, "", (("shape", shape),))


def _plain(name: str, side: Side) -> TensorFacts:
    return replace(side.description.tensors[name], kind="parameter", trained=False, tied=name)
