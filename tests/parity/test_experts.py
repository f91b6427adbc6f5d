"""Low-rank updates of experts, beside the models' own loops over experts with merged weights."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import peftsurgery as ps

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FOUR = {"num_local_experts": 4}
CHOICE = {"num_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
}
# architecture, config beside the sizes, implementation
CASES: list[tuple[str, dict[str, Any], str | None]] = [
    ("Mixtral", FOUR, "grouped_mm"),
    ("Mixtral", FOUR, "batched_mm"),
    ("GptOss", {**FOUR, "head_dim": 8, "num_experts_per_tok": 2}, "grouped_mm"),
    ("GptOss", {**FOUR, "head_dim": 8, "num_experts_per_tok": 2}, "batched_mm"),
    ("Llama4Text", {**FOUR, "head_dim": 8, "intermediate_size_mlp": 40}, None),
    ("Qwen3Moe", {**CHOICE, "head_dim": 8, "moe_intermediate_size": 20}, "grouped_mm"),
    ("DeepseekV3", {**LATENT, "moe_intermediate_size": 20, "num_experts_per_tok": 2}, "grouped_mm"),
    ("Olmoe", CHOICE, "grouped_mm"),
    ("GraniteMoe", {**FOUR, "num_experts_per_tok": 2}, "grouped_mm"),
    ("JetMoe", {**FOUR, "kv_channels": 8}, None),
]
FAST = ("Llama4Text",)
PARAMS = [
    pytest.param(
        *case, marks=[] if case[0] in FAST else [pytest.mark.slow], id=f"{case[0]}-{case[2]}"
    )
    for case in CASES
]


def built(architecture: str, config: Mapping[str, Any], implementation: str | None) -> nn.Module:
    """A model of one layer, in double precision."""
    torch.manual_seed(0)
    made = getattr(transformers, f"{architecture}Config")(**{**SIZES, **config})
    model = transformers.AutoModel.from_config(made).eval().double()
    if implementation is not None:
        model.set_experts_implementation(implementation)
    return model


def merged(
    base: Mapping[str, Tensor], learnt: Mapping[str, Tensor], scale: float
) -> dict[str, Any]:
    """The stacks with their updates, in plain torch: W + scale B A for each expert."""
    found = {}
    for name in learnt:
        if name.endswith(".A"):
            owner, _, leaf = name.removesuffix(".A").partition(".lora_experts")
            full = f"{owner}.{leaf.removeprefix('.') or 'weight'}"
            A, B = learnt[name], learnt[f"{name.removesuffix('A')}B"]
            update = torch.stack([b @ a for a, b in zip(A, B, strict=True)])
            W = base[full]
            found[full] = W + scale * (update if update.shape == W.shape else update.mT)
    return found


@pytest.mark.parametrize(("architecture", "config", "implementation"), PARAMS)
def test_experts_run_train_and_fold_as_the_loop_over_experts_with_merged_weights(
    architecture: str, config: Mapping[str, Any], implementation: str | None
) -> None:
    model = built(architecture, config, implementation)
    ids = torch.randint(3, 60, (2, 7))
    graph = ps.capture(model)
    stacks = [site for site in ps.sites(graph).where(kind="experts") if ".self_" not in site.module]
    assert {site.role for site in stacks} == {"ffn.gate_up", "ffn.down"}
    assert len(ps.sites(graph).where(role="moe.router"))
    operated = ps.apply(graph, "lora_experts", rank=3, alpha=3).double().eval()
    learnt = {name: nn.init.normal_(p, std=0.3) for name, p in operated.learnt().items()}
    loop = deepcopy(model)
    if implementation is not None:
        loop.set_experts_implementation("eager")
    weights = merged(model.state_dict(), learnt, 1.0)
    assert len(weights) == sum(p.dim() == 3 for p in model.parameters())
    ours = operated(input_ids=ids).last_hidden_state
    wanted = torch.func.functional_call(loop, weights, (ids,)).last_hidden_state
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-9)
    probe = torch.randn_like(ours)
    gradients = torch.autograd.grad((wanted * probe).sum(), list(learnt.values()))
    (ours * probe).sum().backward()
    for factor, gradient in zip(learnt.values(), gradients, strict=True):
        torch.testing.assert_close(factor.grad, gradient, rtol=0, atol=1e-9)
        assert gradient.any()
    folded = ps.fold(operated).state_dict()
    for name, W in weights.items():
        torch.testing.assert_close(folded[name], W, rtol=0, atol=1e-12)
    untouched = model.state_dict().keys() - weights.keys()
    assert all(torch.equal(folded[name], model.state_dict()[name]) for name in untouched)


def test_a_model_in_half_precision_has_updates_of_any_rank() -> None:
    """Its grouped product takes rows of whole 16 bytes alone, which a rank of 3 is not."""
    model = built("Mixtral", FOUR, "grouped_mm").bfloat16()
    graph, ids = ps.capture(model), torch.randint(3, 60, (2, 7))
    operated = ps.apply(graph, "lora_experts", rank=3)
    learnt = {name: nn.init.normal_(p, std=0.1) for name, p in operated.learnt().items()}
    ours = operated(input_ids=ids).last_hidden_state
    with torch.no_grad():
        wanted = ps.fold(operated)(input_ids=ids).last_hidden_state
        plain = graph(input_ids=ids).last_hidden_state
    assert (ours - wanted).norm() < 0.02 * (ours - plain).norm()
    ours.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in learnt.values())


@pytest.mark.slow
def test_stacks_in_files_are_folded_on_files(tmp_path: Path) -> None:
    config = transformers.GptOssConfig(**SIZES, **FOUR, head_dim=8, num_experts_per_tok=2)
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    operated = ps.apply(ps.capture(model), "lora_experts", rank=3)
    for parameter in operated.learnt().values():
        nn.init.normal_(parameter, std=0.3)
    operated.save(tmp_path / "surgery")
    ps.fold_checkpoint(tmp_path / "surgery", tmp_path / "base", tmp_path / "out")
    ours = transformers.GptOssForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, W in merged(model.state_dict(), operated.learnt(), 16 / 3).items():
        assert not torch.equal(ours[name], model.state_dict()[name])
        torch.testing.assert_close(ours[name], W, rtol=0, atol=1e-6)
