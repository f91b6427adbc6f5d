"""ONNX files are compared with each other, and with the models that they were exported from."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import peftsurgery as ps
from peftsurgery.diff.comparison import Diff
from peftsurgery.diff.onnx_graph import SCOPES, read_onnx
from tests.diff.models import Layer, Recipe, captured

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3)


def told(found: Diff) -> list[str]:
    return [str(line) for line in found.summary.lines]


def write(path: Path, act: str = "Relu", weight: Any = WEIGHT, scale: float = 2.0) -> Path:
    """act(x W) * scale, in the module ``up``, as torch's exporter writes it."""
    nodes = [
        helper.make_node("MatMul", ["x", "val_1"], ["product"]),
        helper.make_node("Add", ["product", "up.bias"], ["sum"]),
        helper.make_node(act, ["sum"], ["y"]),
        helper.make_node("Mul", ["y", "val_2"], ["z"]),
    ]
    for node, scopes in zip(nodes, (["", "up"], ["", "up"], ["", "act"], [""]), strict=True):
        entry = node.metadata_props.add()
        entry.key, entry.value = SCOPES, repr([*scopes, "node"])
    values = {
        "val_1": weight,
        "up.bias": np.ones(weight.shape[1], np.float32),
        "val_2": np.float32(scale),
    }
    made = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])
        for name, width in (("x", weight.shape[0]), ("z", weight.shape[1]))
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], made)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


def test_a_file_has_its_modules_names_and_weights_as_out_and_in(tmp_path: Path) -> None:
    found = read_onnx(write(tmp_path / "a.onnx"))
    shapes = {name: str(each) for name, each in found.description.tensors.items()}
    assert shapes == {"up.weight": "float32[3, 4]", "up.bias": "float32[3]"}
    held = found.values["up.weight"]
    assert held.read([(0, held.count)]) == WEIGHT.T.tobytes()
    assert (found.figures.parameters, found.figures.bytes) == (15, 60)
    nodes = found.description.classes["0"].nodes
    assert nodes["y"].module == "act"
    assert "2.0" in nodes["z"].form
    assert nodes["x"].shape == "float32[*, 4]"


def test_two_files_differ_by_what_was_done(tmp_path: Path) -> None:
    one = write(tmp_path / "a.onnx")
    assert not ps.diff(one, write(tmp_path / "same.onnx"), weights=True)
    swapped = ps.diff(one, write(tmp_path / "b.onnx", act="Tanh"))
    assert told(swapped) == ["~ act: Relu → Tanh"]
    scaled = ps.diff(one, write(tmp_path / "c.onnx", scale=3.0))
    assert told(scaled) == ["~ (model): Mul(%0, 2.0) → (%0, 3.0)"]
    wide = told(ps.diff(one, write(tmp_path / "d.onnx", weight=WEIGHT.repeat(2, 1))))
    assert "~ up.weight: [3, 4] → [6, 4]" in wide
    values = ps.diff(one, write(tmp_path / "e.onnx", weight=WEIGHT + 1), weights=True)
    assert values.summary.differs == {"structure": False, "config": False, "weights": True}
    (line,) = told(values)
    assert line.startswith("~ up.weight: ")


@pytest.mark.slow
def test_a_model_is_its_own_export_and_not_that_of_another(tmp_path: Path) -> None:
    graph = captured()
    ps.export_onnx(graph, tmp_path / "a.onnx")
    same = ps.diff(graph, tmp_path / "a.onnx", weights=True)
    assert not same
    assert (
        same.summary.sentence()
        == "no difference of inputs, outputs, tensors and kinds of operations"
    )
    plain = Layer()
    other = captured(Recipe((plain, replace(plain, hidden=20), plain)))
    assert told(ps.diff(tmp_path / "a.onnx", other)) == [
        "~ layers.1.mlp.up.weight: [12, 8] → [20, 8]",
        "~ layers.1.mlp.up.bias: [12] → [20]",
        "~ layers.1.mlp.down.weight: [8, 12] → [8, 20]",
    ]


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x0a"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    with pytest.raises(ps.SurgeryError) as refused:
        ps.diff(path, path)
    assert refused.value.code == "PSG222"
    with pytest.raises(ps.SurgeryError) as refused:
        ps.diff(path, tmp_path / "gone.onnx")
    assert refused.value.code == "PSG222"


def test_without_the_package_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ps.SurgeryError) as refused:
        ps.diff(path, path)
    assert refused.value.code == "PSG902"
    assert "peftsurgery[onnx]" in str(refused.value)
