"""Folds on files: one rounding of the exact sum, all other bytes as they were, and back again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPConfig, CLIPModel

import peftsurgery as ps
from peftsurgery.checkpoint import rounding
from peftsurgery.errors import SurgeryError
from tests.formats.stored import ALPHA, RANK, adapter_at, base_at, content, tensors_of


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A sharded bf16 base, and a LoRA for all of its linears."""
    root = tmp_path_factory.mktemp("llama")
    more = {"num_key_value_heads": 2, "intermediate_size": 48}
    base = base_at(root / "base", "Llama", torch.bfloat16, "20KB", **more)
    targets = r".*(q_proj|k_proj|o_proj|down_proj)"
    return base, adapter_at(root / "lora", base, target_modules=targets)


@pytest.fixture(scope="module")
def folded(llama: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That adapter folded into that base, with residuals."""
    base, adapter = llama
    before = content(base)
    out = tmp_path_factory.mktemp("folded") / "out"
    report = ps.fold_checkpoint(adapter, base, out, reversible=True)
    assert len(report.changed) == 8
    assert content(base) == before
    return out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_element_is_one_rounding_of_the_exact_sum(tmp_path: Path, dtype: torch.dtype) -> None:
    base = base_at(tmp_path / "base", "Llama", dtype, "20KB", intermediate_size=48)
    adapter = adapter_at(tmp_path / "lora", base, target_modules=["v_proj", "up_proj"])
    ps.fold_checkpoint(adapter, base, tmp_path / "out")
    learnt = load_file(adapter / "adapter_model.safetensors")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    names = {"float16": np.float16, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
    target = np.dtype(names[str(dtype).removeprefix("torch.")])
    checked = 0
    for name, value in before.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{path}.lora_A.weight" not in learnt:
            assert torch.equal(after[name].view(torch.uint8), value.view(torch.uint8))
            continue
        A, B = (learnt[f"{path}.lora_{which}.weight"].double().numpy() for which in "AB")
        exact = value.double().numpy() + ALPHA / RANK * (B @ A)
        found = after[name].double().numpy()
        # the nearest number of the dtype, or where fp32's own error decides, its neighbour
        error = np.abs(found - exact)
        nearest = np.abs(exact.astype(target).astype(np.float64) - exact)
        assert (error <= nearest + 4 * np.spacing(np.abs(exact).astype(np.float32))).all()
        checked += 1
    assert checked == 4


def test_where_nothing_was_compiled_the_same_bytes_are_written(
    tmp_path: Path,
    llama: tuple[Path, Path],
    folded: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rounding, "_compiled", lambda: None)
    base, adapter = llama
    ps.fold_checkpoint(adapter, base, tmp_path / "out", reversible=True)
    with_c, without = content(folded), content(tmp_path / "out")
    said, again = (json.loads(each.pop("peftsurgery.json")) for each in (with_c, without))
    assert without == with_c
    # Sums of squares differ in their last digits.
    for name, entry in said["tensors"].items():
        change = again["tensors"][name].pop("change", {})
        assert change == pytest.approx(entry.pop("change", {}), rel=1e-5)
    assert again["tensors"] == said["tensors"]


def test_a_scalar_that_was_trained_is_folded(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    text = {**sizes, "num_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0}
    view = {**sizes, "num_attention_heads": 4, "image_size": 32, "patch_size": 16}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config=view, projection_dim=32)
    CLIPModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = CLIPModel.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    operated = ps.apply(ps.capture(model), "lora_qv", train=["logit_scale"])
    scale = operated.get_parameter("logit_scale")
    scale.data.add_(0.5)
    operated.save(tmp_path / "lora")
    report = ps.fold_checkpoint(tmp_path / "lora", tmp_path / "base", tmp_path / "out")
    assert report.changed["logit_scale"]["moved"] == 1
    assert torch.equal(tensors_of(tmp_path / "out")["logit_scale"], scale.detach())


def test_it_is_bit_for_bit_what_a_fold_in_memory_writes(
    tmp_path: Path, llama: tuple[Path, Path], folded: Path
) -> None:
    base, adapter = llama
    ps.fold_to_directory(str(adapter), str(tmp_path / "whole"), base=str(base))
    mine, theirs = tensors_of(folded), tensors_of(tmp_path / "whole")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_files_and_headers_stay_and_other_copies_of_the_weights_do_not(
    llama: tuple[Path, Path], folded: Path
) -> None:
    base, _ = llama
    before, after = content(base), content(folded)
    assert before.keys() - after.keys() == {"pytorch_model.bin"}
    new = {name for name in after.keys() - before.keys() if not name.endswith(".residual")}
    assert new == {"peftsurgery.json", "README.md"}
    same = {name for name in before if name in after and before[name] == after[name]}
    assert {"config.json", "notes.txt", "extra/table.csv", "model.safetensors.index.json"} <= same
    for path in folded.glob("*.safetensors"):
        length = int.from_bytes(path.read_bytes()[:8], "little")
        # the same tensors in the same order at the same places
        assert json.loads(path.read_bytes()[8 : 8 + length]) == json.loads(
            (base / path.name).read_bytes()[8 : 8 + length]
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "config", "more"),
    [
        ("GPT2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, {}),
        ("Phi3", {"target_modules": ["qkv_proj", "o_proj"]}, {"intermediate_size": 48}),
        ("Llama", {"target_modules": ["q_proj"], "use_dora": True}, {"intermediate_size": 48}),
        ("Llama", {"target_modules": ["q_proj"], "use_rslora": True}, {"intermediate_size": 48}),
        (
            "Llama",
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            {"intermediate_size": 48, "tie_word_embeddings": False},
        ),
    ],
    ids=["turned", "fused", "dora", "rslora", "trained head"],
)
def test_outputs_are_those_of_peft(
    tmp_path: Path, kind: str, config: dict[str, Any], more: dict[str, Any]
) -> None:
    base = base_at(tmp_path / "base", kind, torch.float32, "1GB", **more)
    adapter = adapter_at(tmp_path / "lora", base, **config)
    ps.fold_checkpoint(adapter, base, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    original = AutoModelForCausalLM.from_pretrained(base)
    wrapped = peft.PeftModel.from_pretrained(original, adapter).eval()
    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        gap = (plain(ids).logits - wrapped(ids).logits).abs().max()
        moved = (plain(ids).logits - AutoModelForCausalLM.from_pretrained(base)(ids).logits).abs()
    assert float(gap) < 2e-5 < float(moved.max())
    assert ps.verify(tmp_path / "out").changed == len(
        [1 for entry in certificate(tmp_path / "out")["tensors"].values() if "base" in entry]
    )


def certificate(folder: Path) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((folder / "peftsurgery.json").read_text())
    return said


def test_the_certificate_says_how_far_a_tensor_was_moved(
    llama: tuple[Path, Path], folded: Path
) -> None:
    before, after = tensors_of(llama[0]), tensors_of(folded)
    said = certificate(folded)["tensors"]
    for name, entry in said.items():
        moved = int((before[name] != after[name]).sum())
        assert ("base" in entry) == bool(moved)
        if moved:
            change = (after[name].double() - before[name].double()).norm()
            relative = float(change / before[name].double().norm())
            assert entry["change"]["moved"] == moved
            assert entry["change"]["relative"] == pytest.approx(relative, rel=0.02)
            assert entry["change"]["largest_ulp"] > 1
            assert 0 < entry["change"]["rounding"] < 0.01


@pytest.mark.parametrize("where", ["tensor", "header", "config", "missing", "more"])
def test_verify_finds_what_was_touched(tmp_path: Path, folded: Path, where: str) -> None:
    out = shutil.copytree(folded, tmp_path / "out")
    assert ps.verify(out).tensors == len(tensors_of(folded))
    weights = max(out.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(weights.read_bytes())
    if where == "tensor":
        data[-1] ^= 1
        weights.write_bytes(data)
    elif where == "header":
        place = data.index(b'"format":"pt"')
        data[place + 10 : place + 12] = b"tp"
        weights.write_bytes(data)
    elif where == "config":
        (out / "config.json").write_text("{}")
    elif where == "missing":
        (out / "notes.txt").unlink()
    else:
        (out / "new.txt").write_text("new")
    with pytest.raises(SurgeryError, match="PSG417") as refused:
        ps.verify(out)
    assert refused.value.exit_code == 4


def test_unfold_restores_every_byte_from_residuals_alone(
    tmp_path: Path, llama: tuple[Path, Path], folded: Path
) -> None:
    base, _ = llama
    hidden = base.rename(base.with_name("hidden"))
    try:
        restored = ps.unfold_checkpoint(folded, tmp_path / "back")
    finally:
        hidden.rename(base)
    wanted = content(base)
    wanted.pop("pytorch_model.bin")
    assert content(tmp_path / "back") == wanted
    assert restored.changed == 8


def test_unfold_from_a_base_that_is_another_is_refused(
    tmp_path: Path, llama: tuple[Path, Path], folded: Path
) -> None:
    base, _ = llama
    ps.unfold_checkpoint(folded, tmp_path / "back", base=base)
    assert tensors_equal(tmp_path / "back", base)
    other = shutil.copytree(base, tmp_path / "other")
    shard = next(path for path in other.glob("*.safetensors") if "layers.0" in str(load_file(path)))
    tensors = load_file(shard)
    name = next(name for name in tensors if "q_proj" in name or "down_proj" in name)
    tensors[name].view(torch.uint8).reshape(-1)[-1] ^= 1
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(SurgeryError, match="is not the tensor that was folded"):
        ps.unfold_checkpoint(folded, tmp_path / "wrong", base=other)
    assert not (tmp_path / "wrong").exists()


def tensors_equal(one: Path, other: Path) -> bool:
    mine, theirs = tensors_of(one), tensors_of(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


@pytest.mark.slow
def test_a_dtype_is_given_to_every_tensor(tmp_path: Path, llama: tuple[Path, Path]) -> None:
    base, adapter = llama
    ps.fold_checkpoint(adapter, base, tmp_path / "out", dtype="float32")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert {value.dtype for value in after.values()} == {torch.float32}
    kept = [name for name in before if torch.equal(before[name].float(), after[name])]
    assert len(kept) == len(before) - 8
    sizes = sum(value.numel() * 4 for value in after.values())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sizes
    assert ps.verify(tmp_path / "out").tensors == len(before)


@pytest.mark.slow
def test_what_cannot_be_folded_on_files_is_refused_before_anything_is_written(
    tmp_path: Path, llama: tuple[Path, Path]
) -> None:
    base, adapter = llama
    empty = adapter_at(tmp_path / "empty", base, target_modules=["q_proj"], init_lora_weights=True)
    learnt = load_file(empty / "adapter_model.safetensors")
    zero = {name: torch.zeros_like(value) for name, value in learnt.items()}
    save_file(zero, empty / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SurgeryError, match="PSG415"):
        ps.fold_checkpoint(empty, base, tmp_path / "out")
    with pytest.raises(SurgeryError, match="PSG602"):
        ps.fold_checkpoint(adapter, base, base / "inner")
    with pytest.raises(SurgeryError, match="PSG904"):
        ps.fold_checkpoint(adapter, base, tmp_path / "out", dtype="float33")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("out", ".out"))]
    assert os.path.isdir(base)
    assert not (base / "inner").exists()


@pytest.mark.slow
def test_a_saved_surgery_is_folded_as_well(tmp_path: Path, llama: tuple[Path, Path]) -> None:
    base, _ = llama
    model = ps.apply(ps.capture(str(base)), "ia3")
    model.bind()
    with torch.no_grad():
        for _name, value in model.named_parameters():
            if value.requires_grad:
                value.copy_(1 + 0.1 * torch.randn(value.shape, generator=torch.Generator()))
    model.save(tmp_path / "surgery")
    ps.fold_checkpoint(tmp_path / "surgery", None, tmp_path / "out")
    wanted = dict(ps.fold(model).state_dict())
    after = tensors_of(tmp_path / "out")
    assert after
    assert all(torch.equal(value, wanted[name]) for name, value in after.items())


@pytest.mark.slow
def test_what_names_leave_open_is_planned_by_a_process_of_its_own(
    tmp_path: Path, llama: tuple[Path, Path]
) -> None:
    base, _ = llama
    sizes = {"intermediate_size": 48, "tie_word_embeddings": False}
    plain = base_at(tmp_path / "plain", "Llama", torch.float32, "1GB", **sizes)
    adapter = adapter_at(tmp_path / "lora", plain, target_modules=["embed_tokens", "q_proj"])
    code = (
        "import sys; from peftsurgery.cli.root import root; "
        "rc = 0\ntry: root(sys.argv[1:])\nexcept SystemExit as e: rc = e.code\n"
        "print(rc, sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )

    def ran(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=True)

    done = ran("fold", adapter, "--base", plain, "-o", tmp_path / "out", "--stream")
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    original = AutoModelForCausalLM.from_pretrained(plain)
    merged = peft.PeftModel.from_pretrained(original, adapter).merge_and_unload().state_dict()
    for name, value in tensors_of(tmp_path / "out").items():
        assert torch.allclose(value, merged[name], rtol=1e-5, atol=2e-6), name
    # what it refuses is refused here by the same code
    done = ran("fold", adapter, "--base", base, "-o", tmp_path / "other", "--stream", "--json")
    assert done.stdout.splitlines()[-1] == "3 []"
    assert "PSG5" in done.stdout
    assert not (tmp_path / "other").exists()
