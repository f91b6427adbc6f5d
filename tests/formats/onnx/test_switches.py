"""Switches: what is off is not computed, what is on is what it was; numbers are not checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from peftsurgery.formats.onnx.switches import skip_what_is_off, without_checks_for_nan

CHOSEN = """
<ir_version: 9, opset_import: ["" : 18]>
chosen (float[N,2] x, float[1] on) => (float[N,2] z)
<float[2,2] W = {1, 2, 3, 4}, float zero = {0}> {
    y = MatMul(x, W)
    square = MatMul(W, W)
    added = MatMul(x, square)
    new = Add(y, added)
    is_on = Greater(on, zero)
    chosen = Where(is_on, new, y)
    z = LAST(chosen)
}
"""
CHECKED = """
<ir_version: 9, opset_import: ["" : 18]>
checked (float[2,2] scores, bool[2,2] seen) => (float[2,2] z)
<float zero = {0}, float low = {-3e38}> {
    mask = Where(seen, zero, low)
    masked = Add(scores, mask)
    shares = Softmax(masked)
    bad = IsNaN(shares)
    numbers = Where(bad, zero, shares)
    z = Relu(numbers)
}
"""


def model_of(text: str) -> Any:
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))


def operators(model: Any) -> list[str]:
    return [node.op_type for node in model.graph]


def run(model: Any, **given: Any) -> Any:
    made = ir.serde.serialize_model(model)
    onnx.checker.check_model(made)
    session = onnxruntime.InferenceSession(
        made.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, given)[0]


@pytest.mark.parametrize("last", ["Identity", "Relu"])
@pytest.mark.parametrize("on", [0.0, 1.0])
def test_what_is_off_is_skipped_and_what_is_on_is_computed(on: float, last: str) -> None:
    model = model_of(CHOSEN.replace("LAST", last))
    x, W = np.array([[1, -2], [3, 0.5]], np.float32), np.array([[1, 2], [3, 4]], np.float32)
    skip_what_is_off(model, {"on"})
    assert operators(model) == ["MatMul", "Greater", "If", last]
    wanted = x @ W + on * (x @ W @ W)
    wanted = np.maximum(wanted, 0) if last == "Relu" else wanted
    np.testing.assert_allclose(run(model, x=x, on=np.array([on], np.float32)), wanted)


def test_an_output_of_the_graph_may_be_chosen() -> None:
    text = CHOSEN.replace("    chosen = Where", "    z = Where").replace(
        "    z = LAST(chosen)\n", ""
    )
    model = model_of(text)
    skip_what_is_off(model, {"on"})
    assert operators(model) == ["MatMul", "Greater", "If"]
    x = np.ones((1, 2), np.float32)
    np.testing.assert_allclose(run(model, x=x, on=np.zeros(1, np.float32)), [[4, 6]])


def test_what_others_read_is_computed_still() -> None:
    model = model_of(CHOSEN.replace("LAST(chosen)", "Add(chosen, added)"))
    skip_what_is_off(model, {"on"})
    assert operators(model) == ["MatMul", "MatMul", "MatMul", "Greater", "If", "Add"]


def test_a_choice_that_is_no_switch_stays() -> None:
    model = model_of(CHOSEN.replace("LAST", "Relu"))
    skip_what_is_off(model, {"another"})
    assert "If" not in operators(model)


def test_probabilities_under_a_finite_mask_are_not_checked() -> None:
    model = model_of(CHECKED)
    without_checks_for_nan(model)
    assert operators(model) == ["Where", "Add", "Softmax", "Relu"]
    scores, seen = np.zeros((2, 2), np.float32), np.array([[True, False], [False, False]])
    found = run(model, scores=scores, seen=seen)
    np.testing.assert_allclose(found, [[1, 0], [0.5, 0.5]])


def test_probabilities_under_an_infinite_mask_are_checked() -> None:
    model = model_of(CHECKED)
    endless = ir.tensor(np.array(-np.inf, np.float32), name="low")
    model.graph.initializers["low"].const_value = endless
    without_checks_for_nan(model)
    assert operators(model)[-3:] == ["IsNaN", "Where", "Relu"]
