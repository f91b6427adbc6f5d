"""read_onnx: an ONNX file as a description, with its initialisers under the names of a module's.

An exporter gives constants that it computed, such as a transposed weight, a number for a name, and
equal tensors one name. So what a matrix product or a convolution of a module takes is that module's
``weight``, and every other tensor that a module reads is its own: the description has them as the
module that was exported had, weights as (out, in). Small numbers are parts of the operations.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peftsurgery.capture.fingerprint import NAMES
from peftsurgery.capture.names import join
from peftsurgery.diff.description import Description, Node, ShapeClass, TensorFacts
from peftsurgery.diff.figures import Figures
from peftsurgery.errors import SurgeryError
from peftsurgery.files import check_regular, why_unread
from peftsurgery.fingerprint import Sampled

SUFFIX = ".onnx"
SCOPES = "pkg.torch.onnx.name_scopes"
SMALL = 16
"""Up to so many numbers are shown with the operation that reads them."""
PRODUCTS = ("MatMul", "Gemm", "Conv")
TURNED = "MatMul"


@dataclass(frozen=True)
class OnnxGraph:
    """An ONNX file: its description and figures, and its tensors' values by the same names.

    ``origins`` has for each of these names that of the initialiser. ``ends`` are the shapes of the
    inputs by name, and those of the outputs in order.
    """

    description: Description
    figures: Figures
    values: Mapping[str, Sampled]
    origins: Mapping[str, str]
    ends: tuple[Mapping[str, str], tuple[str, ...]]


def is_onnx(path: object) -> bool:
    """Whether a path names an ONNX file."""
    return isinstance(path, str | Path) and Path(path).suffix == SUFFIX


def read_onnx(path: Path) -> OnnxGraph:
    """Read an ONNX file; values of its tensors are read when they are asked for.

    PSG902 without the package onnx, PSG222 for a file that is damaged.
    """
    try:
        import onnx
    except ModuleNotFoundError:
        hint = "pip install 'peftsurgery[onnx]'"
        raise SurgeryError("PSG902", "the package 'onnx' is not installed", hint) from None
    message = onnx.ModelProto.__mro__[-2]  # protobuf's; beside it is what it raises
    damage = vars(sys.modules[message.__module__])["DecodeError"]
    try:
        check_regular(path)
        model = onnx.load(path, load_external_data=False)
        if not model.graph.node:
            raise ValueError("it has no graph")
        return _Reader(model, path.parent).read()
    except (damage, OSError, ValueError, KeyError, SyntaxError) as error:
        raise SurgeryError("PSG222", why_unread(path, error)) from None


@dataclass
class _Reader:
    """Reads one file's graph; its tables grow in the order of the nodes."""

    model: Any
    folder: Path
    nodes: dict[str, Node] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)
    """The node of every value, and of every initialiser that is a tensor of a module."""
    tensors: dict[str, TensorFacts] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    turned: set[str] = field(default_factory=set)

    def read(self) -> OnnxGraph:
        graph = self.model.graph
        self.shapes = {
            each.name: _shape(each) for each in (*graph.input, *graph.value_info, *graph.output)
        }
        self.initial = {each.name: each for each in graph.initializer}
        inputs = [each.name for each in graph.input if each.name not in self.initial]
        for name in inputs:
            self._add(name, Node("input", "", (), name, self.shapes[name]))
        for node in graph.node:
            self._operation(node)
        outputs = [each.name for each in graph.output]
        self.nodes["output"] = Node("output", "", *self._operands(outputs), "")
        ends = {n: self.shapes[n] for n in inputs}, tuple(self.shapes[n] for n in outputs)
        return OnnxGraph(self._description(), self._figures(), self._values(), self.origins, ends)

    def _add(self, key: str, node: Node, names: Iterable[str] = ()) -> None:
        self.nodes[key] = node
        self.made.update(dict.fromkeys((key, *names), key))

    def _operation(self, node: Any) -> None:
        module = _module(node)
        for place, name in enumerate(node.input):
            if name in self.initial:
                self._tensor(name, node.op_type, place, module)
        operands, form = self._operands(node.input)
        settings = ", ".join(sorted(_attribute(each) for each in node.attribute))
        first = next((name for name in node.output if name), node.name)
        op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        form += f"{{{settings}}}" if settings else ""
        made = Node(op, module, operands, form, self.shapes.get(first, ""))
        self._add(first, made, node.output)

    def _operands(self, names: Iterable[str]) -> tuple[tuple[str, ...], str]:
        """The nodes of some values, and how they stand there: ``(%0, %1, [2])``."""
        found: dict[str, int] = {}
        shown = []
        for name in names:
            if name in self.made:
                shown.append(f"%{found.setdefault(self.made[name], len(found))}")
            else:
                held = self.initial.get(name)
                shown.append(_constant(self._array(held)) if held is not None else name or "-")
        return tuple(found), f"({', '.join(shown)})"

    def _tensor(self, name: str, op: str, place: int, module: str) -> None:
        """Know an initialiser as a tensor of the module that reads it, if it is one."""
        held, is_named = self.initial[name], "." in name
        if not is_named and not (op in PRODUCTS and place == 1):
            return
        own = join(module, name.rpartition(".")[2] if is_named else "weight")
        shape = tuple(held.dims)
        if not is_named and op == TURNED and len(shape) == 2:
            self.turned.add(name)
            shape = shape[::-1]
        for each in dict.fromkeys((own, name if is_named else own)):
            facts = TensorFacts(_dtype(held.data_type), shape, "parameter", tied=each)
            self.tensors.setdefault(each, facts)
            self.origins.setdefault(each, name)
        if name not in self.made:
            self._add(name, Node("read", own, (), "", str(self.tensors[own])))

    def _array(self, held: Any) -> Any:
        from onnx import numpy_helper

        return numpy_helper.to_array(held, str(self.folder))

    def _values(self) -> dict[str, Sampled]:
        return {name: self._value(origin) for name, origin in self.origins.items()}

    def _value(self, name: str) -> Sampled:
        held, step = self.initial[name], -1 if name in self.turned else 1
        shape = tuple(held.dims)[::step]
        kind = NAMES.get(getattr(torch, _dtype(held.data_type), torch.float32), "")

        def read(spans: Iterable[tuple[int, int]]) -> bytes:
            array = self._array(held)
            flat = (array.T if step < 0 else array).reshape(-1)
            return b"".join(flat[first:end].tobytes() for first, end in spans)

        return Sampled(kind, shape, TensorFacts(kind, shape, "").count, read)

    def _description(self) -> Description:
        model = self.model
        config = {"producer": f"{model.producer_name} {model.producer_version}".strip()}
        config |= {f"opset.{x.domain or 'ai.onnx'}": x.version for x in model.opset_import}
        graph = {"0": ShapeClass("ONNX", self.nodes)}
        return Description("ONNX", graph, {"": ("0",)}, self.tensors, config=config)

    def _figures(self) -> Figures:
        held = [self.initial[name] for name in dict.fromkeys(self.origins.values())]
        counts = [TensorFacts(_dtype(x.data_type), tuple(x.dims), "").count for x in held]
        sizes = [_numpy(each.data_type).itemsize for each in held]
        size = sum(count * width for count, width in zip(counts, sizes, strict=True))
        return Figures(len(self.nodes), sum(counts), 0, size, None, None, "")


def _module(node: Any) -> str:
    """The path of the module that a node comes from, as torch's exporters note it."""
    noted = {each.key: each.value for each in node.metadata_props}
    if SCOPES in noted:
        scopes = [str(each) for each in ast.literal_eval(noted[SCOPES])]
        return scopes[-2] if len(scopes) > 1 and not scopes[0] else ""
    return node.name.strip("/").rpartition("/")[0].replace("/", ".") if "/" in node.name else ""


def _attribute(attribute: Any) -> str:
    """An attribute by its name and value; a graph in it by a hash."""
    from onnx import AttributeProto, helper, numpy_helper

    value = helper.get_attribute_value(attribute)
    if attribute.type == AttributeProto.TENSOR:
        value = _constant(numpy_helper.to_array(value))
    elif attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
        value = hashlib.blake2b(attribute.SerializeToString(), digest_size=8).hexdigest()
    elif isinstance(value, bytes):
        value = value.decode(errors="replace")
    return f"{attribute.name}={value}"


def _constant(array: Any) -> str:
    """A constant's numbers, or its hash if it has many."""
    if array.size <= SMALL:
        return str(array.tolist())
    digest = hashlib.blake2b(array.tobytes(), digest_size=8).hexdigest()
    return f"{array.dtype.name}{list(array.shape)} {digest}"


def _shape(value: Any) -> str:
    """The dtype and sizes of a value; a size that varies is a star."""
    kind = value.type.tensor_type
    sizes = (str(d.dim_value) if d.HasField("dim_value") else "*" for d in kind.shape.dim)
    return f"{_dtype(kind.elem_type)}[{', '.join(sizes)}]" if kind.elem_type else ""


def _dtype(number: int) -> str:
    return str(_numpy(number).name)


def _numpy(number: int) -> Any:
    from onnx import helper

    return helper.tensor_dtype_to_np_dtype(number)
