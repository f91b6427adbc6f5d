"""Recurrent models of transformers: one capture serves every number of tokens, to the last bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import peftsurgery as ps
from tests.capture.pairs import pair_of
from tests.models.zoo import hf

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "use_cache": False}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "Mamba": hf(
        "MambaForCausalLM",
        "MambaConfig",
        **SMALL,
        intermediate_size=32,
        state_size=4,
        time_step_rank=4,
    ),
    "RecurrentGemma": hf(
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        **SMALL,
        intermediate_size=32,
        lru_width=16,
        num_attention_heads=2,
        block_types=["recurrent", "attention"],
    ),
}


def ids(length: int) -> torch.Tensor:
    return torch.arange(3, 3 + 2 * length).view(2, length) % 60


@pytest.mark.parametrize("name", MODELS)
def test_one_capture_serves_every_number_of_tokens(name: str) -> None:
    both = pair_of(MODELS[name](), {"input_ids": ids(8)})
    for length in (2, 11, 30):
        expected, made = both.run(input_ids=ids(length))
        assert torch.equal(made.logits, expected.logits)
        for model, out in ((both.original, expected), (both.graph, made)):
            model.zero_grad()
            out.logits.square().sum().backward()
        grads = dict(both.graph.named_parameters())
        for path, parameter in both.original.named_parameters():
            assert torch.equal(grads[path].grad, parameter.grad)
    assert len(both.graph.captures) == 1


def test_a_rule_finds_its_sites_beside_a_loop_and_serves_every_length() -> None:
    model = MODELS["Mamba"]().eval()
    operated = ps.apply(ps.capture(model, {"input_ids": ids(8)}), "lora_all_linear", rank=2)
    with torch.no_grad():
        for part in operated.parameters():
            if part.requires_grad:
                part.normal_(std=0.1)
    folded = ps.fold(operated).eval()
    for length in (3, 13):
        found = operated.eval()(input_ids=ids(length)).logits
        expected = folded(input_ids=ids(length)).logits
        assert torch.allclose(found, expected, atol=1e-5)
        assert not torch.allclose(found, model(input_ids=ids(length)).logits, atol=1e-2)
    assert len(operated.captures) == 1
    assert "ssm.dt" in str(operated.report)
