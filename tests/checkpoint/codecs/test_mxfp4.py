"""Experts in MXFP4, as GPT-OSS is stored: read as transformers does, folded, written either way."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import peftsurgery as ps
from peftsurgery.checkpoint.codecs.coded import CodedWeight, plain_view
from peftsurgery.errors import SurgeryError
from peftsurgery.model_files import read_model_files
from tests.formats.stored import content, tensors_of

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
ROUTING = {"num_local_experts": 4, "num_experts_per_tok": 2}
TOKENS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the base, the model that it means, and a LoRA for that."""
    root = tmp_path_factory.mktemp("oss")
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**SIZES, **HEADS, **ROUTING, **TOKENS))
    for folder in ("plain", "base"):
        model.to(torch.bfloat16).save_pretrained(root / folder)
    stored, meant = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, value in load_file(root / "plain/model.safetensors").items():
        stored[name] = meant[name] = value
        if name.endswith(tuple(EXPERTS)):
            del stored[name]
            experts, inner, out = value.shape
            blocks = torch.randint(0, 256, (experts, out, inner // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 124, (experts, out, inner // 32), dtype=torch.uint8)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            meant[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
    for folder, tensors in (("plain", meant), ("base", stored)):
        save_file(tensors, root / folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((root / "base/config.json").read_text())
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (root / "base/config.json").write_text(json.dumps({**config, "quantization_config": said}))
    plain = AutoModelForCausalLM.from_pretrained(root / "plain", dtype=torch.float32)
    lora: dict[str, Any] = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
    asked = peft.LoraConfig(target_modules=["q_proj"], target_parameters=EXPERTS, **lora)
    wrapped = peft.get_peft_model(plain, asked)
    for name, value in wrapped.named_parameters():
        if "lora_" in name:
            value.data.mul_(0.2)
    wrapped.save_pretrained(root / "lora")
    return root


def merged(oss: Path) -> dict[str, torch.Tensor]:
    """What peft makes of the model that the base means, in fp32."""
    plain = AutoModelForCausalLM.from_pretrained(oss / "plain", dtype=torch.float32)
    wrapped = peft.PeftModel.from_pretrained(plain, oss / "lora")
    return dict(wrapped.merge_and_unload().state_dict())


def coded_in(folder: Path) -> dict[str, CodedWeight]:
    return dict(plain_view(read_model_files(folder)).coded)


def test_experts_are_what_transformers_reads(oss: Path) -> None:
    meant, found = load_file(oss / "plain/model.safetensors"), coded_in(oss / "base")
    assert len(found) == 4
    for name, weight in found.items():
        assert np.array_equal(weight.values(), meant[name].float().numpy())
        assert np.array_equal(weight.values(slice(1, 3)), meant[name].float().numpy()[1:3])


def test_numbers_are_rounded_to_the_nearest_as_the_format_says(oss: Path) -> None:
    weight = next(iter(coded_in(oss / "base").values()))
    parts, before = weight.stored(), weight.values()
    again = {**parts, **weight.codec.encode(before, parts, {})}
    assert np.array_equal(weight.values_of(again), before)
    draw = np.random.default_rng(0)
    exact = draw.standard_normal(before.shape).astype(np.float32)
    exact[0, :32, 0] = 0
    made = weight.codec.encode(exact, parts, {})
    blocks = exact.swapaxes(-1, -2).reshape(-1, 32).astype(np.float64)
    found = weight.values_of({**parts, **made}).swapaxes(-1, -2).reshape(-1, 32)
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = np.concatenate([-grid, grid])
    for block, written in zip(blocks, found, strict=True):
        if not block.any():
            assert not written.any()
            continue
        scale = 2.0 ** (np.floor(np.log2(np.abs(block).max())) - 2)
        nearest = np.abs(block[:, None] - scale * grid).min(1)
        np.testing.assert_allclose(np.abs(written - block), nearest, rtol=1e-6, atol=1e-9)


def test_a_fold_adds_to_the_experts_and_writes_them_plain(tmp_path: Path, oss: Path) -> None:
    before, wanted = content(oss / "base"), merged(oss)
    report = ps.fold_checkpoint(oss / "lora", oss / "base", tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert after.keys() == wanted.keys()
    for name, value in after.items():
        gap = (value.float() - wanted[name]).abs()
        assert bool((gap <= wanted[name].abs() * 2**-8 + 1e-6).all()), name
    assert len(report.changed) == 6
    assert content(oss / "base") == before
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    mine = out.state_dict()
    assert all(torch.equal(mine[name], value.float()) for name, value in after.items())
    said = json.loads((tmp_path / "out/peftsurgery.json").read_text())
    assert said["base"] == str(oss / "base")
    ps.unfold_checkpoint(tmp_path / "out", tmp_path / "back")
    assert content(tmp_path / "back") == before


def test_a_fold_quantises_the_experts_again(tmp_path: Path, oss: Path) -> None:
    wanted = merged(oss)
    asked: dict[str, Any] = {"requantise": True, "reversible": True}
    report = ps.fold_checkpoint(oss / "lora", oss / "base", tmp_path / "out", **asked)
    # transformers reads it, and it is nearer to what is meant than the base is
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    old = AutoModelForCausalLM.from_pretrained(oss / "base", dtype=torch.float32)
    mine, before = small.state_dict(), old.state_dict()
    moved = lost = 0.0
    for name in coded_in(oss / "base"):
        change = wanted[name].double() - before[name].double()
        lost += float((mine[name].double() - wanted[name].double()).square().sum())
        moved += float(change.square().sum())
    told = report.to_dict()["requantised"]
    assert told["weights"] == 4
    assert told["lost"] == pytest.approx((lost / moved) ** 0.5, rel=1e-3)
    assert told["lost"] < 1
    assert ps.verify(tmp_path / "out").changed == 10
    ps.unfold_checkpoint(tmp_path / "out", tmp_path / "back")
    assert content(tmp_path / "back") == content(oss / "base")


def test_parts_that_do_not_fit_are_refused(tmp_path: Path, oss: Path) -> None:
    tensors = load_file(oss / "base/model.safetensors")
    name = next(key for key in tensors if key.endswith("down_proj_scales"))
    tensors[name] = tensors[name][..., :-1].contiguous()
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((oss / "base/config.json").read_bytes())
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SurgeryError, match="PSG416"):
        ps.fold_checkpoint(oss / "lora", base, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
