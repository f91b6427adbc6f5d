"""A description of a deep model, made of a shallow one's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peftsurgery.diff.description import Description, Insertion, Node, ShapeClass, TensorFacts


def deep(description: Description, layers: int = 80) -> Description:
    """A description of as many blocks; the last is another one, with a graph of its own."""
    (label,) = set(description.blocks["layers.0"])
    (top,) = description.blocks[""]
    nodes, calls = {}, 0
    for key, node in description.classes[top].nodes.items():
        if node.op != "call":
            swapped = {"layers_2": f"layers_{layers - 1}"}
            nodes[key] = replace(node, operands=tuple(swapped.get(o, o) for o in node.operands))
        elif not calls:
            for calls in range(layers):
                before = node.operands if calls == 0 else (f"layers_{calls - 1}",)
                nodes[f"layers_{calls}"] = Node(
                    "call", f"layers.{calls}", before, "(%0,)", node.shape
                )
    inner = description.classes[label]
    last = dict(inner.nodes)
    last["silu"] = replace(last["silu"], op="relu")
    classes = {label: inner, "last": ShapeClass(inner.kind, last, inner.types)}
    return replace(
        description,
        classes={**classes, top: replace(description.classes[top], nodes=nodes)},
        blocks={
            **{f"layers.{n}": (label if n < layers - 1 else "last",) for n in range(layers)},
            "": (top,),
        },
        sites=repeated(description.sites, layers),
        tensors=repeated(description.tensors, layers),
        insertions=repeated(description.insertions, layers),
    )


def repeated(table: Any, layers: int) -> dict[str, Any]:
    """A table with what is in the first layer in all of them."""
    first = {name: value for name, value in table.items() if name.startswith("layers.0.")}
    rest = {name: value for name, value in table.items() if not name.startswith("layers.")}
    every = {
        name.replace("layers.0.", f"layers.{n}.", 1): placed(value, n)
        for n in range(layers)
        for name, value in first.items()
    }
    return {**every, **rest}


def placed(value: Any, layer: int) -> Any:
    """What is said of the first layer, said of another."""
    match value:
        case Insertion():
            parameters = tuple(n.replace("layers.0.", f"layers.{layer}.") for n in value.parameters)
            module = value.module.replace("layers.0.", f"layers.{layer}.")
            return replace(value, module=module, parameters=parameters)
        case TensorFacts():
            return replace(value, tied=value.tied.replace("layers.0.", f"layers.{layer}."))
        case _:
            return value
