"""The generated forwards call torch's own functions for operators that have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization

import peftsurgery as ps
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
    ATEN.flatten.using_ints: ((x, 0, 1), {}),
    ATEN.unflatten.int: ((x, 2, [2, -1]), {}),
    ATEN.cumsum.default: ((x, 1), {"dtype": torch.float64}),
    ATEN.gather.default: ((x, 2, torch.tensor([[[1], [0], [3]]])), {"sparse_grad": False}),
    ATEN.conv2d.default: ((x[:, None], WEIGHT[None, None], None, [1, 1], [1, 1]), {}),
    ATEN.to.dtype: ((x, torch.float64, False, True), {}),
    ATEN.to.device: ((x, torch.device("cpu"), torch.bool), {}),
    ATEN.to.other: ((x, mask), {}),
    ATEN.to.dtype_layout: ((x,), {"dtype": torch.float64, "layout": torch.strided}),
    ATEN.new_ones.default: ((x, []), {"dtype": torch.bool, "pin_memory": False}),
    ATEN.arange.default: ((3,), {"device": torch.device("cpu"), "pin_memory": False}),
    ATEN.arange.start_step: ((1, 8, 3), {"dtype": torch.int32, "layout": torch.strided}),
    ATEN.detach.default: ((x,), {}),
    ATEN.gelu.default: ((x,), {"approximate": "tanh"}),
    ATEN.scaled_dot_product_attention.default: ((x, x, y, None, 0.0, True), {"scale": 0.3}),
}


def test_bindings_are_there_and_return_what_the_operators_return() -> None:
    for name, binding in BINDINGS.items():
        assert hasattr(ATEN, name.partition(".")[0]), name
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


def test_a_size_is_asked_of_the_tensor() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(ATEN.sym_size.int, (graph.placeholder("a"), -1)))
    assert generate_forward(graph, "three")(None, x) == 4


class Inner(nn.Module):
    """A parameter, one that there is not, a buffer, and a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_parameter("bias", None)
        self.register_buffer("scale", torch.randn(4))
        self.shift = torch.randn(4)


NAMES = ("parts.0.weight", "parts.0.bias", "parts.0.scale", "parts.0.shift", "parts.1.weight")


def reading() -> Callable[[nn.Module], tuple[Any, ...]]:
    """A forward that returns all that it reads."""
    graph = fx.Graph()
    graph.output(tuple(graph.get_attr(name) for name in NAMES))
    return generate_forward(graph, "reading")


def model() -> nn.Module:
    made = nn.Module()
    made.parts = nn.ModuleList([Inner(), Inner()])
    return made


def reached(module: Any, name: str) -> Any:
    for each in name.split("."):
        module = getattr(module, each)
    return module


def by_name(module: Any) -> list[Any]:
    return [reached(module, name) for name in NAMES]


def left_alone(module: Any) -> None:
    pass


def parametrised(module: Any) -> None:
    register_parametrization(module.parts[0], "weight", nn.Tanh())


def pruned(module: Any) -> None:
    prune.l1_unstructured(module.parts[0], "weight", 0.5)


def replaced(module: Any) -> None:
    module.parts[1] = Inner()


def wrapped(module: Any) -> None:
    module.parts[0] = Forwarding(module.parts[0])


def replicated(module: Any) -> None:
    """As DataParallel's replicas have them: plain tensors."""
    part = module.parts[0]
    weight = part._parameters.pop("weight").detach() + 1
    vars(part)["weight"] = weight


class Forwarding(nn.Module):
    """A wrapper that gives what the wrapped module has, as those of FSDP do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)


@pytest.mark.parametrize(
    "change", [left_alone, parametrised, pruned, replaced, wrapped, replicated]
)
def test_what_is_read_is_what_there_is_under_its_name(change: Callable[[Any], None]) -> None:
    forward, module = reading(), model()
    change(module)
    for mine, theirs in zip(forward(module), by_name(module), strict=True):
        assert mine is theirs or torch.equal(mine, theirs)
    values = {name: torch.randn(4, 4) for name, _ in module.named_parameters()}
    module.forward = lambda: (forward(module), by_name(module))
    swapped = torch.func.functional_call(module, values, ())
    for mine, theirs in zip(*swapped, strict=True):
        assert mine is theirs or torch.equal(mine, theirs)


def test_a_part_is_looked_up_once_and_its_tensors_at_every_read() -> None:
    graph = fx.Graph()
    first = graph.get_attr("parts.0.weight")
    graph.call_module("parts.1")
    graph.output((first, graph.get_attr("parts.0.weight")))
    forward, module = generate_forward(graph, "again"), model()
    weight = nn.Parameter(torch.zeros(4, 4))

    def put() -> None:
        module.parts[0].weight = weight

    module.parts[1].forward = put
    before, after = forward(module)
    assert before is not weight
    assert after is weight


class Formatted(nn.Module):
    """A cast that says how the result lies in memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mT.to(torch.float64, memory_format=torch.contiguous_format) * 2


def test_a_cast_may_say_how_the_result_lies_in_memory() -> None:
    x = torch.randn(2, 3, 4)
    graph = ps.capture(Formatted(), {"x": x})
    assert torch.equal(graph(x), Formatted()(x))
