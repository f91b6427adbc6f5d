"""Graphs of captured models as ONNX: with slots for their adapters, with a cache, or both."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import Dim

from peftsurgery.capture import GraphModel
from peftsurgery.formats.onnx.calls import NamedCalls, Tensors
from peftsurgery.formats.onnx.file import OnnxFile, name_sizes, write_checked
from peftsurgery.formats.onnx.narrow import narrowed
from peftsurgery.formats.onnx.runtime import check_outputs
from peftsurgery.formats.onnx.slots import Slots
from peftsurgery.formats.onnx.switches import skip_what_is_off, without_checks_for_nan
from peftsurgery.formats.onnx.translate import translate

EXAMPLE = 3
"""A free size of a slot while a model is exported: any but 0 and 1, which torch takes for fixed."""


def write_graph(
    model: GraphModel, path: Path, calls: NamedCalls, without: NamedCalls, slots: Slots
) -> OnnxFile:
    """Write a graph of ``calls``, made of ``model``, to ``path``.

    It is checked against the calls ``without`` what is in the slots, and with their own values.
    """

    def check(file: Path) -> float:
        tried = without.unseen()
        off = check_outputs(file, [(given, without.outputs(given)) for given in tried])
        on = [({**g, **slots.values}, calls.outputs(g, slots.values)) for g in tried]
        return max(off, check_outputs(file, on)) if slots.values else off

    make = partial(_graph, calls, slots)
    return write_checked(model, path, make, check, "float32", tuple(slots.defaults))


class _Named(nn.Module):
    """A module that is called with tensors by name, those of its slots too."""

    def __init__(self, calls: NamedCalls) -> None:
        super().__init__()
        self.calls, self.module = calls, calls.module

    def forward(self, given: dict[str, Tensor], slots: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name."""
        return self.calls.outputs(given, slots)


def _graph(calls: NamedCalls, slots: Slots) -> Any:
    """The calls as an onnx_ir.Model: what is given, then the slots, which have defaults."""
    given, shapes = calls.example()
    examples = {**slots.defaults, **slots.of_size(EXAMPLE)}
    sizes = {name: dict.fromkeys(slots.sizes.get(name, ()), Dim.AUTO) for name in examples}
    arguments = {"given": given, "slots": examples}
    graph = translate(_Named(calls), arguments, {"given": shapes, "slots": sizes})
    names = (*given, *examples)
    for value, name in zip(graph.graph.inputs, names, strict=True):
        value.name = name
    for value, name in zip(graph.graph.outputs, calls.outputs(given), strict=True):
        value.name = name
    skip_what_is_off(graph, slots.switches)
    _give_defaults(graph, narrowed(graph, slots.defaults))
    without_checks_for_nan(graph)
    name_sizes(graph, _sizes(graph, slots))
    return graph


def _give_defaults(graph: Any, defaults: Tensors) -> None:
    """Let inputs be left out: an input that is an initializer too has a default."""
    import onnx_ir

    for value in graph.graph.inputs:
        if value.name in defaults:
            default = defaults[value.name].contiguous().cpu().numpy()
            value.const_value = onnx_ir.tensor(default, name=value.name)
            graph.graph.initializers[value.name] = value


def _sizes(graph: Any, slots: Slots) -> dict[str, str]:
    """Names of the slots' sizes: rank0, rank1 and so on, one for tensors that share it."""
    names, narrow = dict[str, str](), dict[str, str]()
    for value in graph.graph.inputs:
        free = slots.sizes.get(value.name, {})
        for axis, size in enumerate(value.shape if value.name in slots.defaults else ()):
            if axis in free:
                names.setdefault(str(size), f"{free[axis]}{len(names)}")
            elif not isinstance(size, int):
                narrow[str(size)] = str(size)  # it has its name already
    return {**names, **narrow}
