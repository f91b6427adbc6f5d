"""The generated forwards call torch's own functions for operators that have them."""

from __future__ import annotations

import torch
from torch import fx

from peftsurgery.capture.program import BINDINGS, generate_forward

ATEN = torch.ops.aten
x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
mask = torch.rand(2, 3, 4) > 0.5
WEIGHT = torch.randn(4, 4)
CALLS = {
    ATEN.add.Tensor: ((x, y), {"alpha": 2}),
    ATEN.sub.Tensor: ((x, 1.5), {}),
    ATEN.div.Tensor_mode: ((x, y), {"rounding_mode": "floor"}),
    ATEN.pow.Tensor_Scalar: ((x, 2), {}),
    ATEN.pow.Scalar: ((2.0, x), {}),
    ATEN.mean.dim: ((x, [-1], True), {"dtype": torch.float64}),
    ATEN.cat.default: (([x, y], -1), {}),
    ATEN.stack.default: (([x, y],), {}),
    ATEN.matmul.default: ((x, y.mT), {}),
    ATEN.addmm.default: ((WEIGHT[0], x[0], WEIGHT), {"beta": 0.5}),
    ATEN.transpose.int: ((x, 1, 2), {}),
    ATEN.squeeze.dims: ((x[:1], [0]), {}),
    ATEN.reshape.default: ((x, [-1, 4]), {}),
    ATEN.where.self: ((mask, x, y), {}),
    ATEN.masked_fill.Scalar: ((x, mask, -1.0), {}),
    ATEN.embedding.default: ((WEIGHT, torch.tensor([1, 2]), 1), {}),
    ATEN.layer_norm.default: ((x, [4], WEIGHT[0], None, 1e-5, False), {}),
    ATEN.dropout.default: ((x, 0.5, False), {}),
    ATEN.softmax.int: ((x, -1), {"dtype": torch.float64}),
    ATEN.eq.Scalar: ((x, 0), {}),
    ATEN.select.int: ((x, 1, 2), {}),
    ATEN.permute.default: ((x, [2, 0, 1]), {}),
    ATEN.view.default: ((x, [6, 4]), {}),
    ATEN.view.dtype: ((x, torch.int32), {}),
    ATEN.expand.default: ((x[:1], [5, -1, -1]), {}),
    ATEN.contiguous.default: ((x.mT,), {}),
    ATEN.linear.default: ((x, WEIGHT, WEIGHT[0]), {}),
    ATEN.gelu.default: ((x,), {"approximate": "tanh"}),
    ATEN.scaled_dot_product_attention.default: ((x, x, y, None, 0.0, True), {"scale": 0.3}),
}


def test_bindings_are_there_and_return_what_the_operators_return() -> None:
    for name, binding in BINDINGS.items():
        assert hasattr(ATEN, name), name
        assert callable(eval(binding, {"torch": torch})), name
    for operator, (args, kwargs) in CALLS.items():
        graph = fx.Graph()
        given = [graph.placeholder(f"given_{i}") for i in range(len(args))]
        graph.output(graph.call_function(operator, tuple(given), kwargs))
        made = generate_forward(graph, "one")(None, *args)
        expected = operator(*args, **kwargs)
        assert made.dtype == expected.dtype, operator
        assert torch.equal(made, expected), operator


def test_forwards_call_bindings_and_their_code_names_operators() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(ATEN.mul.Tensor, (graph.placeholder("a"), 2)))
    names = generate_forward(graph, "two").__code__.co_names
    assert "mul" in names
    assert "aten" not in names
