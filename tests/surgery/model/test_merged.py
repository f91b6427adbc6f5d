"""Adapters merged into the running weights: the original's numbers, and nothing of it stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.surgery.model.operated import OperatedModel
from tests.capture.test_threads import together
from tests.parity.models import base, batch, captured
from tests.surgery.reference import randomise

INPUTS = batch(3, 6)
IDS = {"input_ids": INPUTS["input_ids"]}
BIASES = ps.Rule(match="parameter", where={"kind": "bias"}, train=True)
FOLDED: dict[str, list[Any]] = {
    "llama": ["lora_all_linear", "dora", "ia3", "lora_embedding"],
    "gpt2": ["lora_attention", "ia3", BIASES],
    "bert": ["lora_attention", BIASES],
    "t5": ["lora_attention"],
}


@pytest.fixture(autouse=True, params=["llama"])
def name(request: pytest.FixtureRequest) -> str:
    """The model most tests here are of: they run where it is captured already."""
    return str(request.param)


@cache
def model() -> OperatedModel:
    """Two adapters, both active, and prefix tuning that is not; not to be left otherwise."""
    graph = ps.apply(captured("llama"), "lora_attention", name="a", rank=4, alpha=8)
    graph = ps.apply(graph, "lora_qv", name="b", rank=2, alpha=2)
    graph = ps.apply(graph, "prefix_tuning", name="prefix")
    randomise(graph, scale=0.3).deactivate("prefix")
    return graph.eval()


def logits(graph: nn.Module, **more: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = graph(**INPUTS, **more).logits
    return result


def summed() -> nn.Module:
    """The original with W + s B A as its weights, by plain arithmetic."""
    original, graph = base("llama"), model()
    for match in graph.report.matches:
        if match["rule"] in ("lora_attention", "lora_qv"):
            A, B = (graph.get_parameter(name).detach() for name in match["added"])
            scale = 2.0 if match["rule"] == "lora_attention" else 1.0
            original.get_parameter(match["parameter"]).data.add_(scale * (B @ A))
    return original


def state(graph: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Every tensor that a model holds, with the object that it is."""
    held = [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers()]
    return {name: (id(value), value.detach().clone()) for name, value in held}


def assert_unchanged(graph: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    after = state(graph)
    assert after.keys() == before.keys()
    for name, (identity, value) in after.items():
        assert identity == before[name][0]
        assert torch.equal(value, before[name][1])


@pytest.mark.slow
def test_every_signature_is_served_from_the_summed_weights_and_then_as_before() -> None:
    graph, original = model(), summed()
    before, alone = state(graph), logits(graph)
    embedded = {"inputs_embeds": original.get_input_embeddings()(INPUTS["input_ids"]).detach()}
    generated = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), graph.merged():
        for given in (INPUTS, IDS):
            got, expected = graph(**given), original(**given)
            torch.testing.assert_close(got.logits, expected.logits)
            assert (got.loss is None) == (expected.loss is None) == ("labels" not in given)
        torch.testing.assert_close(graph(**embedded).logits, original(**embedded).logits)
        tokens = original.generate(**IDS, **generated)
        assert torch.equal(graph.generate(**IDS, **generated), tokens)
    assert_unchanged(graph, before)
    assert torch.equal(logits(graph), alone)


@pytest.mark.parametrize("name", list(FOLDED))
def test_whatever_folds_is_merged_as_it_is_folded(name: str) -> None:
    for rules in FOLDED[name]:
        graph = randomise(ps.apply(captured(name), rules), scale=0.1).eval()
        before, plain = state(graph), ps.fold(graph).eval()
        with torch.no_grad():
            expected = plain(**batch(2, 5)).logits
            for _ in range(2):
                with graph.merged():
                    torch.testing.assert_close(
                        graph(**batch(2, 5)).logits, expected, rtol=1e-6, atol=1e-6
                    )
        assert_unchanged(graph, before)


def test_calls_that_choose_for_themselves_choose_as_ever() -> None:
    graph = model()
    chosen: list[Callable[[], Tensor]] = [
        lambda: logits(graph, adapters=["a", None, "b"]),
        lambda: logits(graph.base),
        lambda: within(graph, "b"),
        lambda: within(graph, "prefix"),
    ]
    expected = [call() for call in chosen]
    with graph.merged():
        assert all(torch.equal(call(), each) for call, each in zip(chosen, expected, strict=True))
        with graph.only("b"), graph.merged():
            torch.testing.assert_close(logits(graph), expected[2])


def within(graph: OperatedModel, *names: str) -> Tensor:
    with graph.only(*names):
        return logits(graph)


def test_other_threads_and_other_models_of_the_base_see_nothing() -> None:
    graph = model()
    other = ps.apply(captured("llama"), "ia3", name="other").eval()
    alone = [logits(graph), logits(other), logits(graph.base)]
    with graph.merged():
        (seen,) = together(lambda: logits(graph))
        for got, expected in zip((seen, logits(other), logits(graph.base)), alone, strict=True):
            assert torch.equal(got, expected)
        assert not torch.equal(logits(graph), alone[0])


def test_threads_merge_different_adapters_at_once() -> None:
    graph = model()

    def served(*names: str) -> list[Tensor]:
        found = []
        for _ in range(10):
            with graph.only(*names), graph.merged():
                found.append(logits(graph))
        return found

    choices = [("a",), ("b",), ("a", "b"), ()]
    alone, before = [served(*names)[0] for names in choices], state(graph)
    together_ = together(*(lambda names=names: served(*names) for names in choices * 2))
    for got, expected in zip(together_, alone * 2, strict=True):
        assert all(torch.equal(each, expected) for each in got)
    assert_unchanged(graph, before)


def test_what_is_saved_folded_copied_or_operated_on_within_is_unmerged(tmp_path: Path) -> None:
    graph = model()
    expected, names = logits(graph), graph.state_dict().keys()
    graph.save(tmp_path / "outside")
    with graph.merged():
        graph.save(tmp_path / "inside")
        assert graph.state_dict().keys() == names
        assert torch.equal(ps.fold(graph).state_dict()[QUERY], summed().state_dict()[QUERY])
        torch.testing.assert_close(logits(copy.deepcopy(graph)), expected)
        torch.testing.assert_close(logits(ps.apply(graph, "ia3").eval()), expected)
        torch.testing.assert_close(logits(ps.eject(graph, "b")), within(graph, "a"))
    ways = [tmp_path / way / "adapter.safetensors" for way in ("outside", "inside")]
    weights = [file.read_bytes() for file in ways]
    assert weights[0] == weights[1]
    torch.testing.assert_close(logits(ps.load(tmp_path / "inside", captured("llama"))), expected)


QUERY = "model.layers.0.self_attn.q_proj.weight"


def test_an_exception_within_leaves_the_model_as_it_was() -> None:
    graph = model()
    before = state(graph)
    with pytest.raises(IndexError), graph.merged():  # of the embedding, in the middle of a call
        graph(input_ids=torch.full((2, 3), 10_000))
    assert_unchanged(graph, before)


def test_what_cannot_be_merged_is_refused_before_anything_is_changed() -> None:
    graph = model()
    before = state(graph)
    with graph.only("a", "prefix"):
        refused("PSG401", graph)
    with graph.rows(["a", None, "b"]):
        refused("PSG401", graph)
    graph.train()
    refused("PSG355", graph)
    with pytest.raises(ps.SurgeryError) as raised:
        graph.merge()
    assert raised.value.code == "PSG355"
    graph.eval()
    with graph.merged():
        graph.train()
        with pytest.raises(ps.SurgeryError) as raised:
            logits(graph)
        assert raised.value.code == "PSG355"
        graph.eval()
    assert_unchanged(graph, before)


def refused(code: str, graph: OperatedModel) -> None:
    with pytest.raises(ps.SurgeryError) as raised, graph.merged():
        pass
    assert raised.value.code == code


def test_a_pair_of_calls_merges_for_all_threads_until_another_choice_is_made() -> None:
    graph = model()
    before, alone = state(graph), logits(graph)
    graph.unmerge()  # nothing to do
    graph.merge()
    graph.merge()
    with graph.merged():
        merged = logits(graph)
    assert torch.equal(merged, logits(graph))
    assert not torch.equal(merged, alone)
    assert torch.equal(together(lambda: logits(graph))[0], merged)
    twin = copy.deepcopy(graph)
    graph.activate("a")
    assert_unchanged(graph, before)
    assert torch.equal(logits(graph), alone)
    assert torch.equal(logits(twin), merged)
    twin.unmerge()
    assert torch.equal(logits(twin), alone)
    assert state(twin).keys() == before.keys()


def test_a_call_that_is_running_ends_with_the_weights_that_it_began_with() -> None:
    graph = model()
    with graph.merged():
        merged = logits(graph)
    graph.merge()
    block = graph.get_submodule("model.layers.0")
    handle = block.register_forward_hook(lambda *_: graph.unmerge())
    try:
        assert torch.equal(logits(graph), merged)
    finally:
        handle.remove()
    assert not torch.equal(logits(graph), merged)


def test_training_between_two_contexts_is_in_the_second() -> None:
    graph = ps.apply(captured("llama"), "lora_qv").eval()
    with graph.merged():
        before = logits(graph)
    randomise(graph, scale=0.3)
    with graph.merged():
        assert not torch.equal(logits(graph), before)
        torch.testing.assert_close(logits(graph), ps.fold(graph).eval()(**INPUTS).logits)


def test_one_side_of_a_tied_weight_is_merged_and_the_other_is_not() -> None:
    torch.manual_seed(0)
    original: Any = type(base("llama"))(base("llama").config.__class__(**TIED)).eval()
    graph = randomise(ps.apply(ps.capture(original), HEAD), scale=0.3).eval()
    A, B = (value.detach() for value in graph.learnt().values())
    hidden = original.model(**IDS).last_hidden_state.detach()
    head = original.lm_head.weight.detach() + 2 * (B @ A)
    with graph.merged():
        torch.testing.assert_close(logits(graph), hidden @ head.T)


HEAD = ps.Rule(
    match="linear",
    where={"role": "lm_head"},
    params={
        "A": {"shape": [4, "in"], "init": "zeros"},
        "B": {"shape": ["out", 4], "init": "zeros"},
    },
    rewrite="y + 2 * linear(linear(x, A), B)",
    fold="W + 2 * (B @ A)",
)
TIED = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
    "use_cache": False,
}


def test_packed_weights_are_merged_unpacked_and_stay_packed() -> None:
    graph = randomise(ps.apply(captured("llama"), "qlora"), scale=0.1).eval()
    before, expected = state(graph), logits(ps.fold(graph).eval())
    with graph.merged():
        torch.testing.assert_close(logits(graph), expected)
        assert all(value.dtype == torch.uint8 for value in packed(graph))
    assert_unchanged(graph, before)
    torch.testing.assert_close(logits(graph), expected, rtol=1e-4, atol=1e-4)


def packed(graph: OperatedModel) -> list[Tensor]:
    return [graph.get_parameter(name) for name in graph.stored]
