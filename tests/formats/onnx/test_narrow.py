"""Narrow defaults: what is left out changes no bit, what is put in is what it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from peftsurgery.formats.onnx.narrow import narrowed
from tests.formats.onnx.test_switches import model_of, run

SUMMED = """
<ir_version: 9, opset_import: ["" : 18]>
summed (float[N,T,3] x, float[R,3] A, float[4,R] B, float[1] scale) => (float[N,T,4] z)
<float[3,4] W = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}> {
    y = MatMul(x, W)
    turned = Transpose<perm = [1, 0]>(A)
    h = MatMul(x, turned)
    columns = Transpose<perm = [1, 0]>(B)
    found = MatMul(h, columns)
    scaled = Mul(scale, found)
    LAST
}
"""
SUM = "sum = Add(y, scaled)\n    z = Relu(sum)"
x = np.array([[[1, -2, 3], [0, 1, -1]]], np.float32)
W = np.arange(1, 13, dtype=np.float32).reshape(3, 4)


def narrowed_model(last: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model as onnx_ir reads it, shapes of all values known, with narrow slots."""
    import onnx
    import onnx_ir as ir

    made = ir.serde.serialize_model(model_of(SUMMED.replace("LAST", last)))
    model = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(made))
    slots = {"A": torch.zeros(0, 3), "B": torch.zeros(4, 0), "scale": torch.ones(1)}
    return model, narrowed(model, slots)


def test_a_sum_of_nothing_is_one_column_and_what_is_put_in_has_all() -> None:
    model, defaults = narrowed_model(SUM)
    assert {name: tuple(value.shape) for name, value in defaults.items()} == {
        "A": (0, 3),
        "B": (1, 0),
        "scale": (1,),
    }
    assert str(model.graph.inputs[2].shape[0]) == "features0"
    left_out = {name: value.numpy() for name, value in defaults.items()}
    wanted = np.maximum(x @ W, 0)
    np.testing.assert_array_equal(run(model, x=x, **left_out), wanted)
    A = np.array([[1, 2, 3], [-1, 0, 2]], np.float32)
    B = np.array([[1, 0], [0, 1], [2, -1], [3, 3]], np.float32)
    found = run(model, x=x, A=A, B=B, scale=np.array([0.5], np.float32))
    np.testing.assert_allclose(found, np.maximum(x @ W + 0.5 * (x @ A.T @ B.T), 0))


def test_half_an_adapter_is_no_adapter() -> None:
    model, defaults = narrowed_model(SUM)
    left_out = {name: value.numpy() for name, value in defaults.items()}
    with pytest.raises(Exception, match=r"(?i)dimension"):
        run(model, x=x, **{**left_out, "B": np.ones((4, 2), np.float32)})


@pytest.mark.parametrize(
    "last",
    [
        "z = Identity(scaled)",  # an output has to be whole
        "sum = Softmax(scaled)\n    z = Add(y, sum)",  # of one column that is another number
        "sum = Add(scaled, scaled)\n    z = Relu(sum)",  # spread over nothing
        "sum = Add(y, scaled)\n    more = Relu(scaled)\n    z = Add(sum, more)",
    ],
)
def test_what_is_not_spread_keeps_its_size(last: str) -> None:
    model, defaults = narrowed_model(last)
    assert defaults["B"].shape == (4, 0)
    assert model.graph.inputs[2].shape[0] == 4
