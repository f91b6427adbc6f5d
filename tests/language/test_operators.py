"""The operators against torch, on tensors and as graph nodes; and operators of one's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from peftsurgery.errors import SurgeryError
from peftsurgery.language import builtin_operators
from peftsurgery.language.evaluation import evaluate
from peftsurgery.language.expression import parse
from peftsurgery.language.operators import OPERATORS, operator

torch.manual_seed(0)
x, W, b, s = torch.randn(2, 3, 8), torch.randn(6, 8), torch.randn(6), torch.rand(4, 8) + 0.5
ids, image, kernel = (
    torch.tensor([[0, 5], [2, 1]]),
    torch.randn(2, 4, 7, 7),
    torch.randn(6, 2, 3, 3),
)
ENV = {"x": x, "W": W, "b": b, "s": s, "ids": ids, "image": image, "kernel": kernel}

memory = torch.nn.LSTM(6, 4, bidirectional=True).requires_grad_(False)
for name, kind in {"Wi": "weight_ih", "Wh": "weight_hh", "bi": "bias_ih", "bh": "bias_hh"}.items():
    ways = (memory.get_parameter(f"{kind}_l0"), memory.get_parameter(f"{kind}_l0_reverse"))
    ENV[name] = torch.stack(ways)
ENV["steps"] = torch.randn(5, 6)


def cross(v):
    """The skew-symmetric matrix with v above its diagonal, written out."""
    a, b, c = v
    zero = torch.zeros(())
    return torch.stack([zero, a, b, -a, zero, c, -b, -c, zero]).reshape(3, 3)


def rank_two(matrix):
    """The best approximation of rank 2 by the eigenvectors of W Wᵀ."""
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -2:]
    return vectors @ vectors.T @ matrix


ORACLES = {
    "add(x, 1)": x + 1,
    "sub(x, 1)": x - 1,
    "mul(x, x)": x * x,
    "div(x, 2)": x / 2,
    "pow(x, 2)": x**2,
    "neg(x)": -x,
    "max(2, 3)": 3,
    "divisor(48, 10)": 8,
    "small_factor(128, -1)": 8,
    "small_factor(250, -1)": 10,
    "small_factor(360, 8)": 8,
    "small_factor(32, 16)": 16,
    "small_factor(48, 5)": 4,
    "small_factor(13, -1)": 1,
    "divisor(13, 16)": 13,
    "divisor(13, 5)": 1,
    "skew(W[0, :3], 3)": cross(ENV["W"][0, :3]),
    "skew(W[:, :6], 4)[2, 3, 1]": -ENV["W"][2, 4],
    "floor(6.4)": 6,
    "abs(x)": x.abs(),
    "matmul(x, transpose(W))": x @ W.T,
    "linear(x, W)": F.linear(x, W),
    "linear(x, W, b)": F.linear(x, W, b),
    "linear(x, W, 0.0)": F.linear(x, W),
    "embedding(ids, W)": F.embedding(ids, W),
    "take_rows(W, (4, 1))": torch.stack([W[4], W[1]]),
    "put_rows(W, (4, 1), W[:2])": torch.stack([W[0], W[1], W[2], W[3], W[0], W[5]]),
    "conv2d(image, kernel, b, 2, 1, 1, 2)": F.conv2d(image, kernel, b, 2, 1, 1, 2),
    "conv2d(image, kernel, groups=2)": F.conv2d(image, kernel, groups=2),
    "dropout(x, 0.5)": x,
    "layer_norm(x)": F.layer_norm(x, (8,)),
    "layer_norm(s, W[0], W[1])": F.layer_norm(s, (8,), W[0], W[1]),
    "relu(x)": x.clamp(min=0),
    "silu(x)": x * torch.sigmoid(x),
    "gelu(x)": F.gelu(x),
    "tanh(x)": x.tanh(),
    "sigmoid(x)": x.sigmoid(),
    "softmax(x, 1)": x.softmax(1),
    "exp(x)": x.exp(),
    "log(s)": s.log(),
    "sqrt(s)": s.sqrt(),
    "mean(x, 1)": x.mean(1),
    "sum(x, -1, True)": x.sum(-1, True),
    "norm(W, 1)": torch.linalg.norm(W, dim=1),
    "detach(x)": x,
    "transpose(x, 0, 1)": x.transpose(0, 1),
    "reshape(x, (6, -1))": x.reshape(6, 8),
    "view_as(W, reshape(W, (8, 6)))": W.reshape(8, 6),
    "concat(x, x, 1)": torch.cat((x, x), 1),
    "choose(x, x, 2 * x)": torch.minimum(x, 2 * x).where(x <= 0, x),
    "zeros_like(x)": torch.zeros_like(x),
    "ones_like(x)": torch.ones_like(x),
    "eye_like(W @ transpose(W))": torch.eye(6),
    "norm(W, (0, 1))": torch.linalg.norm(W),
    "svd(W, 2)[0] * svd(W, 2)[1] @ svd(W, 2)[2]": rank_two(W),
    "qr(W)[0] @ qr(W)[1]": W,
    "count((1, 2, 3))": 3,
    "size(x, 1)": 3,
    "lstm(steps, Wi, Wh, bi, bh)": memory(ENV["steps"])[0],
    "qr(W, 2)[0] @ qr(W, 2)[1]": torch.linalg.qr(W).Q[:, :2] @ torch.linalg.qr(W).R[:2],
}


@pytest.mark.parametrize("text", ORACLES)
def test_an_operator_computes_what_torch_does(text):
    torch.testing.assert_close(evaluate(parse(text), ENV), ORACLES[text])


@pytest.mark.parametrize("text", [t for t, v in ORACLES.items() if isinstance(v, torch.Tensor)])
def test_an_operator_reads_as_graph_nodes(text):
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxies = {name: fx.Proxy(graph.placeholder(name), tracer) for name in ENV}
    graph.output(evaluate(parse(text), proxies).node)
    module = fx.GraphModule(torch.nn.Module(), graph)
    torch.testing.assert_close(module(*ENV.values()), ORACLES[text])


def test_every_shipped_operator_is_tested_and_documented():
    tested = {text.partition("(")[0] for text in ORACLES}
    shipped = {
        n for n, o in OPERATORS.items() if o.function.__module__ == builtin_operators.__name__
    }
    assert shipped == tested
    assert all(OPERATORS[name].doc for name in shipped)


def test_no_gradient_flows_through_detach():
    leaf = torch.ones(3, requires_grad=True)
    evaluate(parse("sum(p * detach(p), 0)"), {"p": leaf}).backward()
    assert torch.equal(leaf.grad, torch.ones(3))


def test_an_operator_of_ones_own_can_be_called():
    @operator("twice_for_test")
    def twice(value):
        """Two times the value."""
        return value + value

    assert evaluate(parse("twice_for_test(x)"), {"x": 4}) == 8
    assert OPERATORS["twice_for_test"].usage == "twice_for_test(value)"


def test_a_name_has_one_meaning():
    with pytest.raises(SurgeryError) as refusal:
        operator("linear")(lambda a: a)
    assert refusal.value.code == "PSG143"
    with pytest.raises(SurgeryError):
        operator("not a name")(lambda a: a)
