"""Batches whose rows use different adapters: every row is what its adapter alone makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.surgery.model.operated import OperatedModel
from tests.parity.models import batch, captured
from tests.surgery.reference import randomise

BIASES = ps.Rule(match="parameter", where={"kind": "bias"}, train=True)
INPUTS = ps.Rule(
    match="linear",
    where={"role": "ffn.down"},
    params={"s": {"shape": ["in"], "init": "ones"}},
    rewrite={"x": "x * s"},
)
RULES: dict[str, Any] = {
    "lora": "lora_attention",
    "dora": "dora",
    "table": "lora_embedding",
    "inputs": INPUTS,
    "biases": BIASES,
    "bottleneck": "houlsby",
    "prefix": "prefix_tuning",
}
WITH = {"llama": ["lora", "dora", "table", "inputs"], "gpt2": [*RULES][:5], "bert": list(RULES)}
WITH["t5"] = WITH["qwen3"] = WITH["llama"]


@pytest.fixture(autouse=True, params=["llama"])
def name(request: pytest.FixtureRequest) -> str:
    """The model most tests here are of: they run where it is captured already."""
    return str(request.param)


@cache
def several(name: str) -> OperatedModel:
    """A model with several adapters, none of them active."""
    model: Any = captured(name)
    for adapter in WITH[name]:
        model = ps.apply(model, RULES[adapter], name=adapter, exact=True)
    randomise(model, scale=0.2).deactivate()
    return model.eval()


def logits(model: nn.Module, rows: int, **more: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**batch(rows, 6), **more).logits
    return result


def expected(model: OperatedModel, names: Sequence[str | None], rows: int) -> Tensor:
    """For every row, the row of the same batch under its adapter alone."""
    whole = {}
    for name in set(names):
        with model.only(*([name] if name else [])):
            whole[name] = logits(model, rows)
    return torch.stack([whole[name][row] for row, name in enumerate(names)])


@pytest.mark.parametrize("name", list(WITH))
def test_each_row_is_what_its_adapter_alone_makes_of_it(name: str) -> None:
    model = several(name)
    names = [*WITH[name], None, "lora", "table"]
    result = logits(model, len(names), adapters=names)
    assert torch.equal(result, expected(model, names, len(names)))
    assert model.active == ()
    base = logits(model, len(names))
    apart = (result - base).abs().amax((1, 2))
    assert all((gap > 1e-3) == (given is not None) for given, gap in zip(names, apart, strict=True))


@pytest.mark.parametrize("name", ["gpt2"])
def test_rows_of_the_base_alone_are_the_base(name: str) -> None:
    model = several(name)
    assert torch.equal(logits(model, 3, adapters=[None] * 3), logits(model, 3))


def test_a_rows_context_serves_batches_whose_rows_are_repeated() -> None:
    model = several("llama")
    with model.rows(["lora", None]):
        repeated = logits(model, 6)
        with model.only("dora"):
            inner = logits(model, 6)
        assert torch.equal(logits(model, 6), repeated)
        with pytest.raises(ps.SurgeryError, match="PSG401"):
            ps.fold(model)
        with pytest.raises(ps.SurgeryError, match=r"PSG314: .* named for 2 rows, .* has 5"):
            logits(model, 5)
    assert torch.equal(repeated, expected(model, ["lora"] * 3 + [None] * 3, 6))
    assert torch.equal(inner, expected(model, ["dora"] * 6, 6))
    assert model.active == ()


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 2])
def test_rows_generate_what_their_adapters_alone_generate(beams: int) -> None:
    model, rows = several("llama"), ["lora", None, "dora"]
    prompt = batch(3, 6)["input_ids"]
    given = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    with model.rows(rows):
        together = model.generate(prompt, **given)
    for row, name in enumerate(rows):
        with model.only(*([name] if name else [])):
            assert torch.equal(model.generate(prompt, **given)[row], together[row])


def test_wrong_rows_are_refused_and_change_nothing() -> None:
    model = several("llama")
    for names, code in ((["lora"] * 2, "PSG314"), ([], "PSG314"), (["lora", "lo"], "PSG310")):
        with pytest.raises(ps.SurgeryError, match=code):
            logits(model, 4, adapters=names)
    assert (model.active, torch.equal(logits(model, 4), logits(several("llama"), 4))) == ((), True)


@pytest.mark.parametrize("name", ["gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_are_trained_each_by_its_own_adapter(name: str, checkpointing: bool) -> None:
    model, names = several(name), ["lora", "biases", None]
    model.activate("lora", "biases")
    model.train().gradient_checkpointing(checkpointing)
    model(**batch(3, 6), adapters=names).logits.square().sum().backward()
    mixed = {name: value.grad for name, value in model.learnt("lora", "biases").items()}
    for row, used in enumerate(names[:2]):
        model.zero_grad()
        with model.only(str(used)):
            result = model(**batch(3, 6)).logits
        result[row].square().sum().backward()  # where other copies are in place
        for full, value in model.learnt(str(used)).items():
            torch.testing.assert_close(mixed[full], value.grad, rtol=1e-5, atol=1e-6, msg=full)
    model.zero_grad()
    model.gradient_checkpointing(False)
    model.eval().deactivate()


@pytest.mark.parametrize("name", ["gpt2"])
def test_tables_that_rows_share_are_told_apart_where_they_meet_the_batch(name: str) -> None:
    rule = ps.Rule(
        match="embedding",
        where={"role": "embed.positions"},
        params={"T": {"shape": ["in", "out"]}},
        rewrite="y + embedding(x, T)",
    )
    both = ps.apply(several(name), rule, name="positions")
    randomise(both, scale=0.2).deactivate()
    names = ["positions", None, "lora"]
    assert torch.equal(logits(both, 3, adapters=names), expected(both, names, 3))


@pytest.mark.parametrize("name", ["t5"])
def test_what_leaves_a_block_before_it_meets_the_batch_is_refused(name: str) -> None:
    rule = ps.Rule(
        match="parameter", where={"path": r".*relative_attention_bias\.weight"}, train=True
    )
    model = ps.apply(captured(name), rule, name="distances", exact=True)
    randomise(model, scale=0.2)
    before = logits(model, 3)
    with pytest.raises(ps.SurgeryError, match=r"PSG313: distances at .*relative_attention_bias"):
        logits(model, 3, adapters=["distances", None, None])
    assert torch.equal(logits(model, 3), before)
    assert model.active == ("distances",)


def test_a_prompt_makes_the_text_of_all_rows_longer_and_is_refused() -> None:
    model = ps.apply(several("llama"), "prompt_tuning", name="prompt")
    with pytest.raises(ps.SurgeryError, match="PSG313: prompt changes the length"):
        logits(model, 2, adapters=["prompt", "lora"])
    model.deactivate()
    assert torch.equal(logits(model, 2, adapters=["lora", None])[1], logits(model, 2)[1])


@pytest.mark.parametrize("name", ["bert"])
def test_a_row_may_use_a_fusion_and_another_what_is_fused(name: str) -> None:
    graph: Any = captured(name)
    for adapter in ("one", "two"):
        graph = ps.apply(graph, "pfeiffer", name=adapter, exact=True)
    model = randomise(ps.apply(graph, "adapter_fusion", name="fused", adapters=["one", "two"]))
    names = ["one", "fused", None, "two"]
    got, alone = logits(model, 4, adapters=names), expected(model, names, 4)
    torch.testing.assert_close(got, alone, rtol=0, atol=1e-6)  # what is grouped is rounded apart


class Turned(nn.Module):
    """Products over [tokens, batch, width] and over [tokens * batch, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        turned = self.first(x.transpose(0, 1))
        flat = self.second(turned.reshape(-1, 4).relu())
        return flat.view(turned.shape).transpose(0, 1)


class Sorted(nn.Module):
    """A product over tokens in an order that depends on them, as experts make them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 4)
        order = flat[:, 0].argsort()
        return self.first(flat[order])[order.argsort()].view(x.shape)


def operated(module: nn.Module) -> OperatedModel:
    graph = ps.capture(module.eval(), inputs={"x": torch.randn(3, 2, 4)})
    return randomise(ps.apply(graph, "lora_all_linear", name="lora", exact=True), scale=0.3)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("module", [Turned, Sorted])
def test_the_batch_is_found_wherever_it_is(module: type[nn.Module], rows: int) -> None:
    model, x = operated(module()), torch.randn(rows, 5, 4)
    names = ["lora", None, "lora", None, None][:rows]
    with torch.no_grad():
        result, changed = model(x, adapters=names), model(x)
        with model.only():
            base = model(x)
    assert (changed - base).abs().amax((1, 2)).amin() > 1e-3
    for row, name in enumerate(names):
        assert torch.equal(result[row], (changed if name else base)[row])
