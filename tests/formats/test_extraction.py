"""Adapters from two checkpoints, against peft's own merged weights and numpy's decomposition."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import peftsurgery as ps
from tests.checkpoint.loras import changes, llama


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(
        GPT2Config(**sizes, vocab_size=32, bos_token_id=1, eos_token_id=2)
    ).eval()


def merged(base: nn.Module, config: Any) -> Any:
    """The weights that peft merges a random adapter into."""
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.merge_and_unload()


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (llama, LoraConfig(r=3, target_modules=["q_proj", "embed_tokens"])),
        (llama, LoraConfig(r=2, use_dora=True, target_modules=["down_proj"])),
        (llama, LoHaConfig(r=2, target_modules=["v_proj"])),
        (llama, LoKrConfig(r=2, decompose_factor=4, target_modules=["q_proj"])),
        (llama, OFTConfig(r=0, oft_block_size=4, target_modules=["up_proj"])),
        (gpt2, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)),
    ],
    ids=["embedding", "dora", "loha", "lokr", "oft", "conv1d"],
)
def test_what_peft_merged_is_what_peft_adds_by_the_extracted_adapter(
    build: Any, config: Any, tmp_path: Path
) -> None:
    build().save_pretrained(tmp_path / "base")
    tuned = merged(build(), config)
    tuned.save_pretrained(tmp_path / "tuned")
    report = ps.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora")
    assert report.left_out == {}
    assert report.lost < 1e-5
    after, before = tuned.state_dict(), build().state_dict()
    found = changes(tmp_path / "lora", build())
    assert {name for name in before if (after[name] - before[name]).any()} == found.keys()
    for name, change in found.items():
        assert (change - (after[name] - before[name])).abs().max() < 1e-5


@pytest.mark.parametrize("wish", [{"rank": 4}, {"energy": 0.7}])
def test_a_full_training_is_cut_where_numpy_cuts_it(wish: dict[str, Any], tmp_path: Path) -> None:
    plain, tuned = llama(), llama()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    plain.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="10KB")
    report = ps.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora", **wish)
    missing = whole = 0.0
    for name, parameter in tuned.named_parameters():
        gap = (parameter - plain.get_parameter(name)).detach().double().numpy()
        if gap.ndim == 1:
            norm = float(np.linalg.norm(gap))
            assert report.left_out[name] == pytest.approx(norm, rel=1e-5)
            missing, whole = missing + norm**2, whole + norm**2
            continue
        values = np.linalg.svd(gap, compute_uv=False)
        share = np.cumsum(values**2) / np.sum(values**2)
        rank = wish.get("rank") or int(np.argmax(share >= wish["energy"])) + 1
        layer = report.layers[name.removesuffix(".weight")]
        assert layer.rank == rank
        assert layer.lost == pytest.approx(np.sqrt(1 - share[rank - 1]), rel=1e-3)
        missing, whole = missing + np.sum(values[rank:] ** 2), whole + np.sum(values**2)
    assert report.lost == pytest.approx(np.sqrt(missing / whole), rel=1e-4)
    assert "no LoRA can say" in str(report)
    PeftModel.from_pretrained(llama(), str(tmp_path / "lora"))  # as peft's own


def test_a_bf16_rounding_is_not_taken_for_what_was_learnt(tmp_path: Path) -> None:
    base = llama(hidden_size=64, intermediate_size=96).to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    wide = llama(hidden_size=64, intermediate_size=96).to(torch.bfloat16).float()
    config = LoraConfig(r=2, lora_alpha=40, target_modules=["v_proj"])
    merged(wide, config).to(torch.bfloat16).save_pretrained(tmp_path / "tuned")
    report = ps.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora")
    assert {layer.rank for layer in report.layers.values()} == {2}


def test_tied_heads_that_a_fold_untied_are_compared_with_the_table(tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    operated = ps.apply(ps.capture(str(tmp_path / "base")), "lora_embedding", rank=2)
    with torch.no_grad():
        operated.get_parameter(operated.cuts[0].parameters["A"]).normal_()
    ps.fold(operated).save_pretrained(tmp_path / "tuned")
    report = ps.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora")
    assert set(report.layers) == {"model.embed_tokens"}


def rewritten(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = torch.inf


def grow(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = torch.zeros(40, 16)


def whole_numbers(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.int32)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda tensors: tensors, "PSG415"),
        (poison, "PSG403"),
        (grow, "PSG420"),
        (whole_numbers, "PSG416"),
        (lambda tensors: tensors.pop("model.norm.weight"), "PSG420"),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "PSG420"),
    ],
    ids=["same", "infinite", "vocabulary", "quantised", "missing", "more"],
)
def test_what_is_no_pair_of_checkpoints_is_refused_and_leaves_nothing(
    change: Any, code: str, tmp_path: Path
) -> None:
    for name in ("base", "tuned"):
        llama().save_pretrained(tmp_path / name)
    rewritten(tmp_path / "tuned", change)
    with pytest.raises(ps.SurgeryError, match=code):
        ps.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora", rank=2)
    assert sorted(os.listdir(tmp_path)) == ["base", "tuned"]
    with pytest.raises(ps.SurgeryError, match="PSG602"):
        ps.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "tuned", force=True)
