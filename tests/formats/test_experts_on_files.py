"""Experts that lie one by one in a base's files, and in one parameter in the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peftsurgery as ps
from peftsurgery.checkpoint.codecs.coded import plain_view
from peftsurgery.errors import SurgeryError
from peftsurgery.formats.saved_plan import saved_plan
from peftsurgery.formats.streamed_fold import estimate_fold
from peftsurgery.model_files import read_model_files
from tests.checkpoint.codecs.test_coded import quantised
from tests.formats.stored import content, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "num_attention_heads": 4}
HEADS = {"num_key_value_heads": 2, "num_experts_per_tok": 2}
KINDS: dict[str, dict[str, Any]] = {
    "Mixtral": {"intermediate_size": 48, "num_local_experts": 4},
    "Qwen3Moe": {"moe_intermediate_size": 24, "num_experts": 4, "head_dim": 8},
}
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.arange(10).reshape(2, 5)


@pytest.fixture(scope="module", params=KINDS)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a sharded base and a peft adapter for its experts and queries."""
    root = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(
        **SIZES, **HEADS, **KINDS[request.param]
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(root / "base", max_shard_size="20KB")
    plain = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    asked = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=STACKS,
        init_lora_weights=False,
    )  # fmt: skip
    wrapped = peft.get_peft_model(plain, asked)
    for name, value in wrapped.named_parameters():
        if "lora_" in name:
            value.data.mul_(0.2)
    wrapped.save_pretrained(root / "lora")
    return root


def pieces(folder: Path) -> set[str]:
    return {name for name in tensors_of(folder) if ".experts." in name}


def test_a_fold_changes_each_experts_tensor_in_its_place(tmp_path: Path, mixture: Path) -> None:
    base, lora = mixture / "base", mixture / "lora"
    before = content(base)
    assert len(pieces(base)) == 24
    assert all(value.dim() == 2 for n, value in tensors_of(base).items() if ".experts." in n)
    report = ps.fold_checkpoint(lora, base, tmp_path / "out")
    assert pieces(base) < report.changed.keys()
    assert len(report.changed) == 26
    assert tensors_of(tmp_path / "out").keys() == tensors_of(base).keys()
    # transformers joins what was written into what peft merges
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wanted = peft.PeftModel.from_pretrained(plain, lora).merge_and_unload()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    mine, theirs = found.state_dict(), wanted.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        gap = (value - theirs[name]).abs()
        assert bool((gap <= theirs[name].abs() * 2**-8 + 1e-6).all()), name
    # and what the fold in memory writes is the same, to the bit
    ps.fold_to_directory(lora, tmp_path / "whole", base=str(base))
    whole = tensors_of(tmp_path / "whole")
    for name, value in tensors_of(tmp_path / "out").items():
        assert torch.equal(value, whole[name]), name
    assert ps.verify(tmp_path / "out").changed == 26
    ps.unfold_checkpoint(tmp_path / "out", tmp_path / "back")
    assert content(tmp_path / "back") == content(base) == before


def test_residuals_parts_and_dry_runs_hold_for_pieces(
    tmp_path: Path, mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    base, lora = mixture / "base", mixture / "lora"
    found = estimate_fold(lora, base, tmp_path / "out")
    assert found.changed == 26
    ps.fold_checkpoint(lora, base, tmp_path / "out", reversible=True)
    for part in ("2/2", "1/2"):
        ps.fold_checkpoint(lora, base, tmp_path / "parts", part=part, reversible=True)
    assert content(tmp_path / "parts") == content(tmp_path / "out")
    hidden = base.rename(base.with_name("hidden"))
    try:
        ps.unfold_checkpoint(tmp_path / "out", tmp_path / "back")
    finally:
        hidden.rename(base)
    assert content(tmp_path / "back") == content(base)


def test_a_saved_surgery_says_where_the_pieces_are(tmp_path: Path, mixture: Path) -> None:
    base = mixture / "base"
    model = ps.apply(ps.capture(str(base)), "lora_experts", rank=2)
    model.bind()
    with torch.no_grad():
        for value in model.learnt(*model.active).values():
            value.add_(torch.randn(value.shape) * 0.1)
    model.save(tmp_path / "surgery")
    said = json.loads((tmp_path / "surgery/surgery.json").read_text())["fold"]
    assert len(said["stacks"]) == 4
    assert saved_plan(tmp_path / "surgery", None) is not None
    ps.fold_checkpoint(tmp_path / "surgery", None, tmp_path / "out")
    wanted = ps.fold(model)
    found = type(wanted).from_pretrained(tmp_path / "out")
    mine, theirs = found.state_dict(), wanted.state_dict()
    for name, value in theirs.items():
        assert torch.equal(mine[name].to(value.dtype), value), name
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert all(
        name in load_file(tmp_path / "out" / shard) for name, shard in index["weight_map"].items()
    )


@pytest.mark.parametrize("mixture", ["Qwen3Moe"], indirect=True)
@pytest.mark.parametrize("requantise", [False, True])
def test_quantised_experts_are_folded_one_by_one_too(
    tmp_path: Path, mixture: Path, requantise: bool
) -> None:
    """As DeepSeek-V3 is stored: each expert's matrices in FP8, with scales beside them."""
    base = shutil.copytree(mixture / "base", tmp_path / "base")
    joined = tensors_of(base)
    for path in base.glob("*.safetensors*"):
        path.unlink()
    save_file(joined, base / "model.safetensors", metadata={"format": "pt"})
    meant, before = quantised(base, "fp8", ".experts."), content(base)
    report = ps.fold_checkpoint(mixture / "lora", base, tmp_path / "out", requantise=requantise)
    plain = AutoModelForCausalLM.from_pretrained(mixture / "base", dtype=torch.float32)
    state = plain.state_dict()
    for name in [n for n in state if n.endswith(tuple(STACKS))]:
        kinds = ["down"] if "down_proj" in name else ["gate", "up"]
        stack = name.rpartition(".")[0]
        parts = [
            torch.cat([meant[f"{stack}.{expert}.{kind}_proj.weight"] for kind in kinds])
            for expert in range(len(state[name]))
        ]
        state[name] = torch.stack(parts).float()
    plain.load_state_dict(state)
    wanted = peft.PeftModel.from_pretrained(plain, mixture / "lora").merge_and_unload().state_dict()
    view = plain_view(read_model_files(tmp_path / "out"))
    stack = "model.layers.1.mlp.experts.down_proj"
    for expert, exact in enumerate(wanted[stack]):
        name = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
        if requantise:
            found, was = torch.from_numpy(view.coded[name].values()), meant[name]
            assert (found - exact).norm() < 0.5 * (was - exact).norm()
        else:
            found = tensors_of(tmp_path / "out")[name].float()
            assert bool(((found - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all())
    again = report.to_dict()["requantised"]
    assert (again is not None) is requantise
    assert ps.verify(tmp_path / "out").changed
    ps.unfold_checkpoint(tmp_path / "out", tmp_path / "back")
    assert content(tmp_path / "back") == content(base) == before


@pytest.mark.parametrize("mixture", ["Mixtral"], indirect=True)
@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_a_stack_of_which_a_piece_does_not_fit_is_refused(
    tmp_path: Path, mixture: Path, damage: str
) -> None:
    base = shutil.copytree(mixture / "base", tmp_path / "base")
    tensors = tensors_of(base)
    for path in base.glob("*.safetensors*"):
        path.unlink()
    piece = next(name for name in tensors if "experts.2.w1" in name)
    value = tensors.pop(piece)
    if damage == "shape":
        tensors[piece] = value[:-1].contiguous()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SurgeryError, match=r"PSG416.*gate_up_proj"):
        ps.fold_checkpoint(mixture / "lora", base, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
