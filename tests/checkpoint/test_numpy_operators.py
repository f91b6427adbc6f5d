"""The operators of folds over arrays, against torch's own of the same names."""

from typing import Any

import numpy as np
import pytest
import torch

from peftsurgery.checkpoint.numpy_operators import _AS_THEY_ARE, _FUNCTIONS, NUMPY
from peftsurgery.language.evaluation import evaluate
from peftsurgery.language.expression import parse
from peftsurgery.language.operators import OPERATORS, operator

CASES = [
    "max(2, 3.5)",
    "floor(7 / 2)",
    "matmul(W, x)",
    "sqrt(abs(W)) + sqrt(4)",
    "exp(W) + exp(1)",
    "log(abs(W)) + log(2)",
    "abs(W)",
    "size(W, 1) + count((1, 2))",
    "divisor(12, 5) + small_factor(12, -1)",
    "sigmoid(W)",
    "tanh(W)",
    "mean(W, 0)",
    "mean(W, (0, 1), keepdim=True)",
    "sum(W, -1, keepdim=True)",
    "norm(W, 1)",
    "norm(W, (0, 1))",
    "detach(W)",
    "transpose(W)",
    "transpose(W, 0, 1)",
    "reshape(W, (2, -1))",
    "view_as(W, transpose(x))",
    "concat(W, W, dim=0)",
    "zeros_like(W)",
    "ones_like(W)",
    "eye_like(W @ transpose(W))",
    "W[1:3, :2] / 3 - W[1:3, 1:3] ** 2",
    "softmax(W, -1)",
    "take_rows(W, (3, 1))",
    "put_rows(W, (3, 1), W[:2])",
    "skew(W, 4)",
    "skew(W[0, :3], 3)",
]


@pytest.mark.parametrize("text", CASES)
def test_an_operator_gives_what_torch_gives(text: str) -> None:
    generator = torch.Generator().manual_seed(0)
    W, x = (torch.randn(4, 6, generator=generator) for _ in range(2))
    x = x.T.contiguous()
    wanted = evaluate(parse(text), {"W": W, "x": x}, OPERATORS)
    found = evaluate(parse(text), {"W": W.numpy(), "x": x.numpy()}, NUMPY)
    assert np.shape(found) == tuple(np.shape(wanted))
    np.testing.assert_allclose(found, np.asarray(wanted), rtol=1e-5, atol=1e-6)
    assert not isinstance(found, np.ndarray) or found.dtype == np.float32


def test_every_operator_of_the_table_is_tested() -> None:
    called = {name for text in CASES for name in parse(text).calls}
    assert called >= _AS_THEY_ARE | set(_FUNCTIONS)
    assert set(OPERATORS) >= _AS_THEY_ARE | set(_FUNCTIONS)


def test_an_operator_of_ones_own_runs_as_the_torch_code_that_it_is() -> None:
    @operator("halved_for_arrays")
    def halved(x: Any) -> Any:
        """Half of x."""
        return torch.mul(x, 0.5)

    found = evaluate(parse("halved_for_arrays(W) + 1"), {"W": np.ones((2, 2), np.float32)}, NUMPY)
    assert isinstance(found, np.ndarray)
    assert found.tolist() == [[1.5, 1.5], [1.5, 1.5]]
