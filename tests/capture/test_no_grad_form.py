"""Without gradients fewer operators run; outputs, inputs and weights have the bits they had."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftsurgery as ps
from peftsurgery.capture.no_grad_form import no_grad_form
from peftsurgery.capture.program import Program, generate_forward
from peftsurgery.capture.schemas import shares_memory
from tests.capture.pairs import assert_same, assert_same_gradients, pair, pair_of
from tests.capture.test_cleanup import exported
from tests.models.remembering import PAST, original, remembering
from tests.models.zoo import ZOO, ids

aten = torch.ops.aten


def targets(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


class Norm(nn.Module):
    """A residual norm, with results that are written over, and some that must not be."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.weight = nn.Linear(8, 8), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        kept = self.linear(x * scale * self.weight)
        wide = torch.exp(scale * 2) * x  # of another size than the scale
        view = kept.view(-1)
        return x + torch.sigmoid(kept), view * 2, wide.double() + wide


def test_values_that_nothing_else_reads_are_written_over_and_no_others() -> None:
    module, x = Norm(), torch.randn(2, 3, 8)
    flat = exported(lambda *given: module(*given), x)
    graph = no_grad_form(flat.graph)
    assert targets(graph).count("aten.add_.Tensor") == 1  # of three sums, two are of other values
    assert "aten.pow.Tensor_Scalar" not in targets(graph)
    assert {"aten.rsqrt_.default", "aten.exp_.default"} <= set(targets(graph))
    assert "aten.sigmoid_.default" not in targets(graph)  # what it would write over is viewed
    before, weights = x.clone(), copy.deepcopy(module.state_dict())
    with torch.no_grad():
        made = generate_forward(graph, "norm")(flat, x)
        assert_same(module(x), tuple(made))
    assert torch.equal(x, before)
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())


def test_a_graph_that_writes_is_left_alone() -> None:
    def body(x: Tensor) -> Tensor:
        made = x.pow(2)
        made[:, 0].mul_(made[:, 1])
        return made.view(-1).view(2, 3).sin()

    flat = exported(body, torch.randn(2, 3))
    assert targets(no_grad_form(flat.graph)) == targets(flat.graph)


def given_back(x: Tensor) -> Tensor:
    """A conjugate that is the value itself, which is read again."""
    y = x.sin()
    return torch.conj_physical(y).exp() + y


def test_a_value_that_an_operator_gives_back_is_not_written_over() -> None:
    x = torch.randn(4, 6)
    flat = exported(given_back, x)
    (made,) = generate_forward(no_grad_form(flat.graph), "given back")(flat, x)
    assert torch.equal(made, given_back(x))


def pointwise() -> Iterator[torch._ops.OpOverload]:
    """The operators that torch says work entry by entry, and give memory of their own."""
    for packet in (getattr(aten, name) for name in dir(aten)):
        if isinstance(packet, torch._ops.OpOverloadPacket):
            found = [getattr(packet, name) for name in packet.overloads()]
            yield from (
                each
                for each in found
                if torch.Tag.pointwise in each.tags and shares_memory(each) is False
            )


def gives_back(operator: torch._ops.OpOverload, value: Tensor) -> bool | None:
    """Whether a result lies in an argument's memory; None for other arguments than these."""
    kinds = {"Tensor": value, "number": 1, "float": 1.0, "int": 1, "bool": False}
    needed = [a for a in operator._schema.arguments if not a.has_default_value()]
    try:
        made = operator(*(kinds[str(each.type)] for each in needed))
    except (KeyError, RuntimeError, TypeError, NotImplementedError):
        return None
    memory = value.untyped_storage().data_ptr()
    results = made if isinstance(made, tuple) else (made,)
    tensors = [each for each in results if isinstance(each, Tensor)]
    return any(each.untyped_storage().data_ptr() == memory for each in tensors)


def test_one_operator_gives_back_what_it_is_given_and_its_schema_does_not_say_so() -> None:
    values = [torch.ones(3, 4, dtype=dtype) for dtype in (torch.float, torch.long, torch.bool)]
    told = {op: [gives_back(op, value) for value in values] for op in pointwise()}
    assert sum(any(each is False for each in found) for found in told.values()) > 100
    assert {str(op) for op, found in told.items() if any(found)} == {"aten.conj_physical.default"}


def dtypes_meet(x: Tensor, y: Tensor) -> Tensor:
    """Sums whose operands are of other dtypes or sizes than the results."""
    half = x.sin().to(torch.bfloat16) * 1.0
    row = y[0].sin()
    return half.exp() + x.cos() + (row * 1) + y.mT.contiguous().mT.sin()


def test_a_result_of_another_dtype_size_or_layout_is_made_anew() -> None:
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    flat = exported(dtypes_meet, x, y)
    (made,) = generate_forward(no_grad_form(flat.graph), "sum")(flat, x, y)
    assert torch.equal(made, dtypes_meet(x, y))
    assert made.stride() == dtypes_meet(x, y).stride()


@pytest.mark.parametrize(
    "name", ["llama", "gpt_neox", "vit", pytest.param("t5", marks=pytest.mark.slow)]
)
def test_outputs_are_those_of_the_original(name: str) -> None:
    both, given = pair(name), ZOO[name].inputs(3, 5)
    before = copy.deepcopy(given)
    with torch.no_grad():
        for _ in range(2):
            assert_same(*both.run(**given))
    assert_same(before, given)


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(each, marks=pytest.mark.slow) for each in ("gpt2", "gemma2"))]
)
def test_tokens_are_those_of_the_original(name: str) -> None:
    models = original(name), remembering(name)
    caches: list[Any] = [None, None]
    for step in range(4):
        given = {"input_ids": ids(2, 6 if step == 0 else 1), "use_cache": True}
        with torch.no_grad():
            expected, actual = (
                model(**given, **({} if cache is None else {PAST: cache}))
                for model, cache in zip(models, caches, strict=True)
            )
        assert torch.equal(actual.logits, expected.logits), step
        caches = [expected[PAST], actual[PAST]]


def test_gradients_are_those_of_the_original_after_calls_without() -> None:
    both, given = pair("functional"), ZOO["functional"].inputs(2, 5)
    with torch.no_grad():
        both.run(**given)
    expected, actual = both.run(**given)
    assert_same(expected, actual)
    expected.sum().backward(), actual.sum().backward()
    assert_same_gradients(both)


class Seen(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_who_looks_on_sees_the_operators_of_the_graph() -> None:
    both, given = pair("llama"), ZOO["llama"].inputs(2, 5)
    with torch.no_grad(), Seen() as seen:
        both.graph(**given)
    assert "aten.pow.Tensor_Scalar" in seen.names
    assert not any(name.split(".")[1].endswith("_") for name in seen.names)


def test_each_row_of_a_transform_is_as_by_itself() -> None:
    both, tokens = pair("llama"), torch.stack([ids(2, 5), ids(2, 5).flip(0)])
    with torch.no_grad():
        together = torch.func.vmap(lambda row: both.graph(input_ids=row).logits)(tokens)
        for row, made in zip(tokens, together, strict=True):
            torch.testing.assert_close(made, both.original(input_ids=row).logits)


def test_hooks_keep_what_they_see() -> None:
    both, given = pair("llama"), ZOO["llama"].inputs(2, 5)
    seen: dict[str, list[Tensor]] = {"original": [], "graph": []}
    for which, kept in seen.items():
        layer = getattr(both, which).model.layers[0]
        for part in (layer, layer.self_attn.q_proj, layer.mlp, layer.mlp.down_proj):
            part.register_forward_hook(
                lambda _, args, result, kept=kept: kept.extend(
                    v for v in (*args, result) if isinstance(v, Tensor)
                )
            )
    with torch.no_grad():
        both.run(**given)
    assert len(seen["graph"]) == len(seen["original"]) > 4
    assert_same(seen["original"], seen["graph"])


def test_a_hidden_state_that_is_returned_is_not_written_over() -> None:
    both, given = pair("llama"), ZOO["llama"].inputs(2, 5)
    with torch.no_grad():
        assert_same(*both.run(**given, output_hidden_states=True))


def test_adapters_give_what_their_own_graphs_give(monkeypatch: pytest.MonkeyPatch) -> None:
    operated = ps.apply(pair("llama").graph, "lora_all_linear").eval()
    with torch.no_grad():
        for name, parameter in operated.named_parameters():
            if name.endswith(".B"):
                parameter.normal_()
        made = operated(**ZOO["llama"].inputs(2, 5)).logits
        monkeypatch.setattr(Program, "no_grad", property(lambda program: program.forward))
        assert torch.equal(operated(**ZOO["llama"].inputs(2, 5)).logits, made)


class Returned(nn.Module):
    """A block list that returns a value beside its square and its halves."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.linear(x)
        first, second = y[..., :4], y[..., 4:]
        return {"y": y, "halves": first, "sum": first.exp() + second, "square": y.pow(2)}


def test_what_a_model_returns_can_be_written_to_as_ever() -> None:
    both = pair_of(Returned(), {"x": torch.randn(2, 8)})
    with torch.no_grad():
        expected, actual = both.run(x=torch.randn(2, 8))
        assert_same(expected, actual)
        for made in (expected, actual):
            made["halves"].zero_()
        assert_same(expected, actual)
