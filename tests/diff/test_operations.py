"""What a graph does is counted alike in torch and in ONNX, however either cuts it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import peftsurgery as ps
from peftsurgery.diff.onnx_graph import SCOPES, read_onnx
from peftsurgery.diff.operations import count_operations
from tests.diff.models import Layer, Recipe, captured
from tests.models.zoo import ZOO

# The same function in the operators of several versions and exporters: node, operands.
Steps = list[tuple[str, list[str], dict[str, Any]]]


def file_of(path: Path, steps: Steps, module: str = "") -> Path:
    """A file that makes ``steps`` of the input x (weights W, V are initialisers), one by one."""
    nodes = [helper.make_node(op, of, [f"v{n}"], **said) for n, (op, of, said) in enumerate(steps)]
    for node in nodes:
        entry = node.metadata_props.add()
        entry.key, entry.value = SCOPES, repr(["", module, "node"] if module else ["", "node"])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "out")]
    ends[1].name = f"v{len(steps) - 1}"
    held = [
        helper.make_tensor(name, TensorProto.FLOAT, shape, [1.0] * (16 if shape else 1))
        for name, shape in (("a.weight", [4, 4]), ("b.weight", [4, 4]), ("c", []))
    ]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], held)), path)
    return path


def counted(path: Path) -> Counter[str]:
    counts = count_operations(read_onnx(path).description.classes["0"].nodes)
    return sum(counts.values(), Counter[str]())


def step(op: str, *operands: str, **said: Any) -> tuple[str, list[str], dict[str, Any]]:
    return op, list(operands), said


ALIKE: dict[str, tuple[dict[str, int], list[Steps]]] = {
    "silu": (
        {"sigmoid": 1},
        [[step("Sigmoid", "x"), step("Mul", "x", "v0")], [step("Swish", "x")]],
    ),
    "gelu": (
        {"erf": 1},
        [
            [step("Gelu", "x")],
            [
                step("Div", "x", "c"),
                step("Erf", "v0"),
                step("Add", "v1", "c"),
                step("Mul", "x", "v2"),
            ],
        ],
    ),
    "gelu by tanh": (
        {"tanh": 1},
        [
            [step("Gelu", "x", approximate="tanh")],
            [
                step("Pow", "x", "c"),
                step("Mul", "v0", "c"),
                step("Add", "x", "v1"),
                step("Tanh", "v2"),
                step("Add", "v3", "c"),
                step("Mul", "x", "v4"),
            ],
        ],
    ),
    "layer norm": (
        {"norm": 1},
        [
            [step("LayerNormalization", "x", "c")],
            [
                step("ReduceMean", "x"),
                step("Sub", "x", "v0"),
                step("Pow", "v1", "c"),
                step("ReduceMean", "v2"),
                step("Add", "v3", "c"),
                step("Sqrt", "v4"),
                step("Div", "v1", "v5"),
            ],
        ],
    ),
    "attention": (
        {"matrix product": 2, "attention core": 1},
        [
            [
                step("MatMul", "x", "a.weight"),
                step("MatMul", "x", "b.weight"),
                step("MatMul", "v0", "v1"),
                step("Mul", "v2", "c"),
                step("Softmax", "v3"),
                step("MatMul", "v4", "v1"),
            ],
            [
                step("MatMul", "x", "a.weight"),
                step("MatMul", "x", "b.weight"),
                step("Attention", "v0", "v1", "v1"),
            ],
        ],
    ),
    "a router is no core": (
        {"matrix product": 2, "softmax": 1, "product of two streams": 1},
        [
            [
                step("MatMul", "x", "a.weight"),
                step("Softmax", "v0"),
                step("Mul", "v1", "x"),
                step("MatMul", "v2", "b.weight"),
            ]
        ],
    ),
    "a root of no mean is no norm": ({}, [[step("Add", "x", "c"), step("Sqrt", "v0")]]),
    "a residual": (
        {"matrix product": 1, "sum of two streams": 1},
        [
            [step("MatMul", "x", "a.weight"), step("Add", "v0", "c"), step("Add", "x", "v1")],
            [step("Gemm", "x", "a.weight", "c"), step("Identity", "x"), step("Add", "v0", "v1")],
        ],
    ),
    "sizes are no stream": (
        {"matrix product": 1},
        [[step("MatMul", "x", "a.weight"), step("Shape", "x"), step("Add", "v0", "v1")]],
    ),
}


@pytest.mark.parametrize("name", ALIKE)
def test_forms_of_one_function_count_alike(name: str, tmp_path: Path) -> None:
    wanted, forms = ALIKE[name]
    for form in forms:
        assert counted(file_of(tmp_path / "a.onnx", form)) == wanted


class Small(nn.Module):
    """A residual block of two layers, whose parts the tests exchange."""

    def __init__(self, act: Callable[[], nn.Module] = nn.GELU, norm: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4) if norm else nn.Identity()
        self.up, self.act, self.down = nn.Linear(4, 8), act(), nn.Linear(8, 4)
        self.is_residual = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.down(self.act(self.up(self.norm(x))))
        return x + made if self.is_residual else made


def exported(path: Path, module: nn.Module) -> Path:
    """The module as torch's own exporter writes it."""
    torch.onnx.export(
        module.eval(), (torch.zeros(2, 4),), path, dynamo=True, dynamic_shapes={"x": {0: "n"}},
        verbose=False,
    )  # fmt: skip
    return path


def without_residual() -> nn.Module:
    made = Small()
    made.is_residual = False
    return made


EDITS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "none": (Small, []),
    "another activation": (lambda: Small(nn.ReLU), ["~ act: erf 1 → 0, relu 0 → 1"]),
    "no norm": (lambda: Small(norm=False), ["~ norm: norm 1 → 0"]),
    "no residual": (without_residual, ["~ (model): sum of two streams 1 → 0"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITS)
def test_what_was_done_before_an_export_is_named(name: str, tmp_path: Path) -> None:
    edit, wanted = EDITS[name]
    graph = ps.capture(Small().eval(), (torch.zeros(2, 4),))
    found = ps.diff(graph, exported(tmp_path / "b.onnx", edit()))
    assert [str(line) for line in found.summary.lines if line.part == "graph"] == wanted
    assert found.summary.differs["structure"] is bool(wanted)
    assert "not compared: masks, positions" in str(found)
    back = ps.diff(tmp_path / "b.onnx", graph)
    assert len([line for line in back.summary.lines if line.part == "graph"]) == len(wanted)


def test_without_the_names_of_modules_whole_models_are_compared(tmp_path: Path) -> None:
    graph = ps.capture(Small().eval(), (torch.zeros(2, 4),))
    model = onnx.load(exported(tmp_path / "a.onnx", Small(nn.ReLU)))
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.name = ""
    onnx.save(model, tmp_path / "bare.onnx")
    lines = [str(line) for line in ps.diff(graph, tmp_path / "bare.onnx").summary.lines]
    assert "~ (model): erf 1 → 0, relu 0 → 1" in lines


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "llama", "resnet", "functional"])
def test_a_model_does_what_its_export_does(name: str, tmp_path: Path) -> None:
    graph = ps.capture(ZOO[name].build(), ZOO[name].inputs(2, 8))
    ps.export_onnx(graph, tmp_path / "a.onnx")
    found = ps.diff(graph, tmp_path / "a.onnx")
    assert [line for line in found.summary.lines if line.part == "graph"] == []


@pytest.mark.slow
def test_one_layer_that_does_otherwise_is_named(tmp_path: Path) -> None:
    plain = Layer()
    graph = captured(Recipe((plain, replace(plain, act="gelu"), plain)))
    ps.export_onnx(captured(Recipe((plain, plain, plain))), tmp_path / "a.onnx")
    lines = [str(line) for line in ps.diff(tmp_path / "a.onnx", graph).summary.lines]
    assert len(lines) == 1
    assert "layers.1.mlp" in lines[0]
    assert "erf 0 → 1" in lines[0]
