"""What surrounds a model's first call is not baked in: it is captured outside, and runs inside."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import peftsurgery as ps
from peftsurgery.capture import capture
from peftsurgery.capture.surroundings import outside, surroundings
from tests.capture.pairs import Pair, assert_same
from tests.models.zoo import ZOO, ids


class Small(nn.Module):
    """A norm, a layer of softmax, and tensors made on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.into(x).float()).to(self.into(x).dtype)
        return self.out(torch.softmax(h, -1) + torch.arange(6, device=x.device))


def fresh() -> Pair:
    """A pair whose graph has seen one call of another rank, so that the next is a first call."""
    torch.manual_seed(0)
    module = Small()
    return Pair(module, capture(module, {"x": torch.randn(2, 3, 4)}))


class _Counting(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to half": lambda: torch.autocast("cpu", dtype=torch.float16),
    "flops": lambda: FlopCounterMode(display=False),
    "functions": _Counting,
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "double": _double,
    "deterministic": _deterministic,
    "hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t + 0, lambda t: t),
    "offload": torch.autograd.graph.save_on_cpu,
    "device": lambda: torch.device("cpu"),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_first_call_in_a_context_is_the_originals_there_and_later_ones_elsewhere(
    name: str,
) -> None:
    both = fresh()
    x = torch.randn(5, 4)
    with CONTEXTS[name]():
        assert_same(*both.run(x))
    expected, actual = both.run(torch.randn(3, 4, requires_grad=True))
    assert_same(expected, actual)
    assert actual.requires_grad
    x = torch.randn(7, 4)
    with CONTEXTS[name]():
        assert_same(*both.run(x))


@pytest.mark.parametrize("name", ["meta", "inference", "flops", "autocast", "double"])
def test_a_model_captured_in_a_context_serves_calls_elsewhere(name: str) -> None:
    torch.manual_seed(0)
    module, x = Small(), torch.randn(2, 4)
    with {**CONTEXTS, "meta": lambda: torch.device("meta")}[name]():
        graph = capture(module, {"x": x})
    both = Pair(module, graph)
    assert_same(*both.run(torch.randn(3, 4)))
    both.run(torch.randn(3, 4))[1].sum().backward()
    assert all(parameter.grad is not None for parameter in graph.parameters())


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_autocast_gives_the_originals_values_and_dtypes_in_any_order(name: str) -> None:
    module = ZOO[name].build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        both = Pair(module, capture(module))
        assert_same(*both.run(**ZOO[name].inputs(2, 7)))
    assert_same(*both.run(**ZOO[name].inputs(3, 5)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(*both.run(**ZOO[name].inputs(3, 6)))


def test_an_operated_model_trains_under_autocast_as_outside() -> None:
    module = ZOO["llama"].build()
    operated = ps.apply(ps.capture(module), "lora_qv", settings={"rank": 2})
    tokens = ids(2, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = module(input_ids=tokens, labels=tokens).loss
        loss = operated(input_ids=tokens, labels=tokens).loss
    assert torch.equal(loss, expected)  # the change is zero at first
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in operated.parameters())
    assert torch.equal(
        operated(input_ids=tokens, labels=tokens).loss, module(input_ids=tokens, labels=tokens).loss
    )


def test_first_calls_within_transforms_are_the_originals() -> None:
    both = fresh()
    x = torch.randn(5, 2, 4)
    assert_same(torch.vmap(both.original)(x), torch.vmap(both.graph)(x))
    assert_same(*both.run(torch.randn(3, 4)))
    both = fresh()
    y = torch.randn(3, 4)
    gradients = [torch.func.grad(lambda v, m=m: m(v).sum())(y) for m in (both.original, both.graph)]
    assert_same(*gradients)
    both = fresh()
    pushed = [torch.func.jvp(m, (y,), (torch.ones_like(y),)) for m in (both.original, both.graph)]
    assert_same(*pushed)
    both = fresh()
    doubled = {name: 2 * value for name, value in both.original.named_parameters()}
    given = [torch.func.functional_call(m, doubled, (y,)) for m in (both.original, both.graph)]
    assert_same(*given)
    assert_same(*both.run(y))


def test_a_first_call_in_a_checkpointed_region_is_the_originals() -> None:
    both = fresh()
    xs = [torch.ones(3, 4, requires_grad=True) for _ in range(2)]
    for model, x in zip((both.original, both.graph), xs, strict=True):
        checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert_same(xs[0].grad, xs[1].grad)


def test_a_first_call_on_tensors_without_content_is_no_other() -> None:
    both = fresh()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        faked = both.graph(mode.from_tensor(torch.randn(3, 4)))
    assert faked.shape == (3, 4)
    assert_same(*both.run(torch.randn(5, 4)))


def test_a_model_whose_first_call_is_exported_is_exported_exactly() -> None:
    both = fresh()
    exported = torch.export.export(both.graph, (torch.randn(3, 4),), strict=False)
    x = torch.randn(3, 4)
    assert_same(both.original(x), exported.module()(x))
    assert_same(*both.run(torch.randn(5, 4)))


def test_a_first_call_in_compiled_code_is_the_originals() -> None:
    both = fresh()

    def twice(x: Tensor) -> Tensor:
        return 2 * both.graph(x)

    x = torch.randn(3, 4)
    made = torch.compile(twice, backend="eager")(x)
    torch._dynamo.reset()
    assert_same(2 * both.original(x), made)
    assert_same(*both.run(torch.randn(5, 4)))


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, TimeoutError])
def test_whatever_ends_the_wait_for_a_capture_ends_the_capture(
    kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    began, ended = threading.Event(), threading.Event()

    def long() -> None:
        try:
            began.set()
            for _ in range(20_000):
                time.sleep(0.001)
        except KeyboardInterrupt:
            ended.set()
            raise

    def interrupted(*_: Any) -> None:
        began.wait()
        raise kind

    monkeypatch.setattr(Future, "result", interrupted)
    with pytest.raises(kind):
        outside(long, surroundings())
    assert ended.is_set()


def test_an_interrupted_capture_leaves_the_model_as_it_was() -> None:
    class Interrupted(Small):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and x.ndim == 2 and self.out.bias.grad is None:
                raise KeyboardInterrupt
            return super().forward(x)

    module = Interrupted().eval()
    before = dict(vars(module))
    with pytest.raises(KeyboardInterrupt):
        capture(module, {"x": torch.randn(2, 4)})
    assert vars(module) == before
    assert not any(part.training for part in module.modules())
    assert "training" not in vars(nn.Module)
