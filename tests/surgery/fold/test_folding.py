"""fold: a plain module of the original's class with the operations in its weights, rounded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import peftsurgery as ps
from tests.models.captured import captured
from tests.models.zoo import ZOO
from tests.surgery.reference import randomise

TRANSFORMERS = ["bert", "gpt2", "opt", "llama", "t5", "falcon_40b", "bloom", "phi3", "gpt_neox"]
OTHERS = ["functional", "transformer_encoder"]


def first(model: torch.nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        result = model(**ZOO[name].inputs(3, 6))
    return result if isinstance(result, Tensor) else result[0]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal to a millionth of the largest output, which is what fp32 can tell apart."""
    assert (actual - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max())


@pytest.mark.parametrize("rule", ["lora_attention", "lora_all_linear", "dora"])
@pytest.mark.parametrize("name", TRANSFORMERS + OTHERS)
def test_the_folded_module_computes_what_the_operated_model_computes(name: str, rule: str) -> None:
    operated = randomise(ps.apply(captured(name), rule), scale=0.02)
    folded = ps.fold(operated)
    assert type(folded) is type(ZOO[name].build())
    assert list(folded.state_dict()) == list(ZOO[name].build().state_dict())
    assert_same(first(folded, name), first(operated, name))


def test_convolutions_fold() -> None:
    operated = randomise(ps.apply(captured("resnet"), "lora_conv", rank=2))
    assert len(operated.report.matches) > 5
    torch.testing.assert_close(
        first(ps.fold(operated), "resnet"), first(operated, "resnet"), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_the_folded_module_reloads_through_from_pretrained(name: str, tmp_path: Path) -> None:
    operated = randomise(ps.apply(captured(name), "lora_all_linear"), scale=0.05)
    folded = ps.fold(operated)
    folded.save_pretrained(tmp_path)
    again = type(folded).from_pretrained(tmp_path).eval()
    assert torch.equal(first(again, name), first(folded, name))


def bf16_llama() -> Any:
    return ZOO["llama"].build().to(torch.bfloat16)


def test_a_bf16_weight_is_the_fp32_sum_rounded_once() -> None:
    model = bf16_llama()
    graph = ps.capture(model)
    operated = randomise(ps.apply(graph, "lora_qv", rank=4, alpha=8), scale=0.3)
    assert {value.dtype for value in operated.learnt().values()} == {torch.float32}
    folded = ps.fold(operated)
    for match in operated.report.matches:
        A, B = (operated.get_parameter(name).detach() for name in match["added"])
        weight = model.get_parameter(match["parameter"]).detach()
        expected = (weight.float() + 2.0 * (B @ A)).to(torch.bfloat16)
        assert torch.equal(folded.get_parameter(match["parameter"]), expected)
    ejected = ps.eject(operated)
    for name, value in model.state_dict().items():
        assert torch.equal(ejected.state_dict()[name], value)


def test_a_tied_head_adapted_alone_is_untied_and_stays_so(tmp_path: Path) -> None:
    rule = ps.Rule(
        match="linear",
        where={"role": "lm_head"},
        params={"A": {"shape": ["out", "in"]}},
        rewrite="y + linear(x, A)",
        fold="W + A",
    )
    model = ZOO["gpt2"].build()
    assert model.lm_head.weight is model.transformer.wte.weight
    operated = randomise(ps.apply(captured("gpt2"), rule))
    folded = ps.fold(operated)
    folded.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again.transformer.wte.weight, model.transformer.wte.weight)
    assert not torch.equal(again.lm_head.weight, again.transformer.wte.weight)
    torch.testing.assert_close(first(again, "gpt2"), first(operated, "gpt2"), atol=1e-6, rtol=1e-5)
    assert model.config.tie_word_embeddings
    assert captured("gpt2").config.tie_word_embeddings


def test_weights_that_no_rule_changed_are_shared_and_others_are_not() -> None:
    graph = captured("llama")
    folded = ps.fold(randomise(ps.apply(graph, "lora_qv")))
    shared, own = "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    assert folded.get_parameter(shared).data_ptr() == graph.get_parameter(shared).data_ptr()
    assert folded.get_parameter(own).data_ptr() != graph.get_parameter(own).data_ptr()
    folded.requires_grad_(False)
    assert all(parameter.requires_grad for parameter in graph.parameters())


def test_a_value_that_is_not_finite_is_refused() -> None:
    operated = ps.apply(captured("llama"), "lora_qv")
    next(iter(operated.learnt().values())).data[0, 0] = float("nan")
    with pytest.raises(ps.SurgeryError, match="PSG403"):
        ps.fold(operated)


def test_a_weight_that_overflows_its_dtype_is_refused() -> None:
    operated = ps.apply(ps.capture(ZOO["llama"].build().to(torch.float16)), "lora_qv", rank=1)
    with torch.no_grad():
        for value in operated.learnt().values():
            value.fill_(1000.0)
    with pytest.raises(ps.SurgeryError, match="PSG402"):
        ps.fold(operated)


def test_a_model_without_operations_folds_to_itself() -> None:
    folded = ps.fold(captured("bert"))
    assert torch.equal(first(folded, "bert"), first(ZOO["bert"].build(), "bert"))


def test_parts_that_are_kept_in_eval_stay_so() -> None:
    operated = ps.apply(captured("bert"), "lora_qv").train()
    operated.get_submodule("bert.encoder.layer.0").eval()
    folded = ps.fold(operated)
    modes = {path: part.training for path, part in folded.named_modules()}
    assert modes == {path: not path.startswith("bert.encoder.layer.0") for path in modes}
