"""Captures and calls from several threads: each is what it is alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import peftsurgery as ps
from peftsurgery.capture.threads import Gate, traced_alone
from tests.parity.models import base, batch, captured


def together(*tasks: Callable[[], Any]) -> list[Any]:
    """What the tasks return, each in a thread of its own, all started at one time."""
    ready = threading.Barrier(len(tasks))

    def run(task: Callable[[], Any]) -> Any:
        ready.wait()
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(run, task) for task in tasks]]


def logits(model: nn.Module, **inputs: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs).logits
    return result


def test_threads_that_call_a_signature_first_share_one_capture() -> None:
    original: Any = base("llama")
    ids = batch(4, 6)["input_ids"]
    model = ps.capture(original, inputs={"input_ids": ids})
    calls: Sequence[dict[str, Any]] = [
        {"input_ids": ids},
        {"inputs_embeds": original.get_input_embeddings()(ids).detach()},
    ]
    expected = [logits(original, **call) for call in calls]
    results = together(*(partial(logits, model, **call) for call in [*calls, *calls]))
    for result, wanted in zip(results, [*expected, *expected], strict=True):
        assert torch.equal(result, wanted)
    assert len(model.captures) == len(calls)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5"])
def test_calls_go_on_while_another_thread_captures(name: str) -> None:
    """T5's table is shared by two modules, which torch.export looks for in whatever is called."""
    original, alone = base(name), captured(name)
    model, inputs = captured("bert"), batch(3, 5)
    expected = logits(model, **inputs)
    done, started, wrong, during = threading.Event(), threading.Event(), list[Any](), list[int]()

    def call() -> None:
        started.set()
        while not done.is_set():
            during.append(1)
            if not torch.equal(logits(model, **inputs), expected):
                wrong.append(1)

    def capture() -> ps.GraphModel:
        started.wait()
        try:
            return ps.capture(original, inputs=batch(2, 5))
        finally:
            done.set()

    made = together(call, call, capture)[-1]
    assert not wrong
    assert len(during) > 4
    code = [[p.code for p in programs] for programs in made.captures[0].programs.values()]
    assert code == [[p.code for p in each] for each in alone.captures[0].programs.values()]


@pytest.mark.slow
def test_what_a_call_reads_of_the_original_is_its_own_during_a_capture() -> None:
    """While the original is traced, its forward takes what the traced call gave, and no more."""
    original = base("llama")
    model = ps.capture(original, cache=True)
    ids = batch(2, 6)["input_ids"]
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    wanted, plain = model.generate(ids, **settings), logits(model, input_ids=ids)
    done = threading.Event()

    def capture() -> None:
        try:
            logits(model, inputs_embeds=torch.randn(2, 4, 32))
        finally:
            done.set()

    def call() -> list[Tensor]:
        results = [logits(model, input_ids=ids)]
        while not done.is_set():
            results.append(logits(model, input_ids=ids))
        return results

    def write() -> list[Tensor]:
        results = [model.generate(ids, **settings)]
        while not done.is_set():
            results.append(model.generate(ids, **settings))
        return results

    _, called, written = together(capture, call, write)
    assert all(torch.equal(result, plain) for result in called)
    assert all(torch.equal(result, wanted) for result in written)
    assert not any(part.training for part in original.modules())


def test_a_capture_that_is_interrupted_as_it_waits_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate()

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    def traced() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Condition, "wait_for", interrupted)
            with pytest.raises(KeyboardInterrupt), gate.closed():
                pytest.fail("the capture began")

    together(traced)
    assert together(gate.enter, gate.enter) == [None, None]


def test_a_capture_that_fails_keeps_nobody_waiting() -> None:
    class Refuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor, wild: bool = False) -> Tensor:
            return self.inner(x[x > 0].reshape(-1, 4)) if wild and x.sum().item() > 0 else x + 1

    model = ps.capture(Refuses(), inputs={"x": torch.ones(2, 4)})

    def refused() -> str:
        with pytest.raises(ps.SurgeryError) as found:
            model(torch.ones(2, 4), wild=True)
        return found.value.code

    assert together(*[refused] * 4) == ["PSG228"] * 4
    assert torch.equal(model(torch.ones(3, 4)), torch.full((3, 4), 2.0))


def test_another_threads_trace_describes_its_tensors_during_a_capture() -> None:
    def described() -> list[Any]:
        graph = make_fx(torch.neg)(torch.ones(2, 3)).graph
        return [node.meta["tensor_meta"] for node in graph.nodes if node.op == "call_function"]

    def other() -> list[Any]:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(described).result()

    (before,) = described()
    assert before.shape == (2, 3)
    with traced_alone():
        assert described() == [None]
        assert other() == [before]
    assert described() == [before]
