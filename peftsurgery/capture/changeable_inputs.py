"""Captures whose inputs can be changed before the model sees them.

A model that takes embeddings as well as token ids has a capture of either kind. Put the embedding's
own nodes, taken from the capture of ids, before the capture of embeddings, and the result takes ids
again; but every size in it now follows from the embeddings, so that they may be made longer, and
more of them, than the ids that were given.

    capture of ids          input_ids -> embedding -> sizes of input_ids, masks, layers
    capture of embeddings   inputs_embeds -> sizes of inputs_embeds, masks, layers
    changeable inputs       input_ids -> embedding -> (here) -> sizes of embeddings, masks, layers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from peftsurgery.capture.captures import Capture
from peftsurgery.capture.module_calls import GIVEN, hand_on
from peftsurgery.capture.program import Program
from peftsurgery.capture.signature import Call
from peftsurgery.capture.sizes import evaluate_sizes, shape_texts, with_shapes
from peftsurgery.reach import reach


@dataclass(frozen=True, eq=False)
class ChangeableInputs:
    """A capture, and the nodes of its top graph that are the inputs of the model behind.

    ``nodes`` are these by the names of the inputs, ``behind`` the conditions on their sizes,
    ``outside`` those on what a call gives.
    """

    capture: Capture
    nodes: Mapping[str, fx.Node]
    behind: tuple[str, ...]
    outside: tuple[str, ...]

    def conditions(self, changed: Mapping[str, Sequence[Any]]) -> tuple[str, ...]:
        """Conditions on a call's sizes when these inputs are given other shapes.

        The shapes are in terms of the symbols that the graph's inputs have.
        """
        return tuple(
            dict.fromkeys((*self.outside, *with_shapes(self.behind, self._texts(changed))))
        )

    def sizes(
        self, changed: Mapping[str, Sequence[Any]], leaves: Sequence[Any]
    ) -> dict[str, tuple[int, ...]]:
        """Sizes of every input, in numbers, for a call with these values."""
        return {
            name: evaluate_sizes(self.capture.names, texts, leaves)
            for name, texts in self._texts(changed).items()
        }

    def _texts(self, changed: Mapping[str, Sequence[Any]]) -> dict[str, tuple[str, ...]]:
        """Sizes of every input, as Python expressions over the call's values."""
        graph = self.capture.top.graph
        shapes = {
            name: node.meta["val"].shape
            for name, node in self.nodes.items()
            if isinstance(node.meta.get("val"), torch.Tensor)
        }
        return {name: shape_texts(graph, shape) for name, shape in {**shapes, **changed}.items()}


def as_given(capture: Capture) -> ChangeableInputs:
    """The inputs of a capture that are all given as the model takes them.

    Its capture is another object, since it is run with changed inputs, and ``capture`` is not.
    """
    nodes = {node.name: node for node in capture.top.graph.find_nodes(op="placeholder")}
    return ChangeableInputs(replace(capture), nodes, capture.conditions, ())


def computed_from(
    given: Capture, behind: Capture, values: Mapping[str, fx.Node]
) -> ChangeableInputs:
    """The inputs of ``behind``, some of them computed from those of ``given``.

    ``values`` are nodes of ``given``'s top graph by the name of the input of ``behind`` that they
    are; the other inputs of ``behind`` are inputs of ``given`` too.
    """
    graph = fx.Graph()
    outer: dict[fx.Node, fx.Node] = {}
    needed = {*reach(values.values(), lambda node: node.all_input_nodes)}
    for node in given.top.graph.nodes:
        if node.op == "placeholder" or node in needed:
            outer[node] = graph.node_copy(node, outer.__getitem__)
    known = {node.name: outer[node] for node in given.top.graph.find_nodes(op="placeholder")}
    known |= {name: outer[node] for name, node in values.items()}
    top = behind.top
    inner = {node: known[node.name] for node in top.graph.find_nodes(op="placeholder")}
    taken = {node.name: made for node, made in inner.items()}
    for node, made in inner.items():
        hand_on(node, made, (GIVEN,))
    graph.output(graph.graph_copy(top.graph, inner))
    tensors = {**given.top.tensors, **top.tensors}
    program = Program(f"{top.label}<{given.top.label}", graph, top.kind, top.modules, tensors)
    capture = replace(
        given,
        programs={**behind.programs, "": (program,)},
        output=behind.output,
        mode=given.mode if behind.mode is None else behind.mode,
        calls={**given.calls, **behind.calls},
    )
    whole = ChangeableInputs(capture, taken, behind.conditions, given.conditions)
    return replace(whole, capture=replace(capture, conditions=whole.conditions({})))


def call_behind(given: Capture, values: Mapping[str, fx.Node], sources: Sequence[str]) -> Call:
    """An example of the call that ``values``, computed from ``given``, are inputs of.

    ``sources`` are the inputs of ``given`` that it does without. All tensors are on meta, and have
    the sizes that follow from this call: a program may be shared with another call's capture.
    """
    graph, leaves = given.top.graph, given.call.leaves
    rest = {name: value for name, value in given.call.tensors.items() if name not in sources}
    made = {
        name: torch.empty(
            evaluate_sizes(given.names, shape_texts(graph, node.meta["val"].shape), leaves),
            dtype=node.meta["val"].dtype,
            device="meta",
        )
        for name, node in values.items()
    }
    return replace(given.call, tensors=dict(sorted({**rest, **made}.items())))
