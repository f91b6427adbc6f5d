"""Quantised bases: read as their quantisers mean them, folded, and written plain."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peftsurgery as ps
from peftsurgery.checkpoint.codecs.coded import plain_view
from peftsurgery.errors import SurgeryError
from peftsurgery.model_files import read_model_files
from tests.checkpoint.codecs.encoders import ENCODERS
from tests.formats.stored import adapter_at, base_at, content, tensors_of

SMALL = {"intermediate_size": 64, "tie_word_embeddings": False, "hidden_size": 64}


def weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.manual_seed(0))


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("shape", [(32, 64), (72, 128)])
def test_a_weight_is_what_its_quantiser_means(
    tmp_path: Path, kind: str, shape: tuple[int, int]
) -> None:
    tensors, said, meant = ENCODERS[kind](weight(*shape))
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    view = plain_view(read_model_files(tmp_path))
    assert {name: tensor.shape for name, (_, tensor) in view.tensors.items()} == {"m.weight": shape}
    found = view.coded["m.weight"].values()
    assert found.dtype == np.float32
    # bitsandbytes multiplies in fp32 too, but its nested scales in another order
    np.testing.assert_allclose(found, meant.float().numpy(), rtol=1e-6, atol=1e-7)


def quantised(base: Path, kind: str, where: str = "layers") -> dict[str, torch.Tensor]:
    """Quantise the linears of some modules of a base in place; returns the weights it means."""
    tensors, stored = load_file(base / "model.safetensors"), dict[str, torch.Tensor]()
    meant, said = dict[str, torch.Tensor](), dict[str, Any]()
    for name, value in tensors.items():
        module = name.removesuffix(".weight")
        if where in name and "proj" in name:
            parts, said, meant[name] = ENCODERS[kind](value.float())
            stored |= {module + key.removeprefix("m"): part for key, part in parts.items()}
        else:
            stored[name] = meant[name] = value
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    return meant


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("coded")
    base = base_at(root / "base", "Llama", torch.bfloat16, "1GB", **SMALL)
    return base, adapter_at(root / "lora", base, target_modules=["q_proj", "down_proj"])


@pytest.mark.parametrize(
    "kind",
    [
        *("fp8", "fp8_whole", "nf4_nested", "gptq_shuffled", "awq", "int8"),
        *("packed_zeros", "packed_in_order", "bytes_tensor", "floats_block", "nvfp4", "mxfp4"),
    ],
)
def test_a_fold_adds_to_what_is_meant_and_writes_it_plain(
    tmp_path: Path, llama: tuple[Path, Path], kind: str
) -> None:
    base = shutil.copytree(llama[0], tmp_path / "base")
    (base / "quantize_config.json").write_text("{}")
    meant, before = quantised(base, kind), content(base)
    ps.fold_checkpoint(llama[1], base, tmp_path / "out")
    learnt = load_file(llama[1] / "adapter_model.safetensors")
    after = tensors_of(tmp_path / "out")
    assert after.keys() == meant.keys()
    for name, value in meant.items():
        path = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        wide = value.float()
        if f"{path}A.weight" in learnt:
            wide = wide + 2 * learnt[f"{path}B.weight"] @ learnt[f"{path}A.weight"]
        gap = (after[name].float() - wide).abs()
        assert after[name].dtype == torch.bfloat16
        assert bool((gap <= wide.abs() * 2**-8 + 1e-6).all()), name
    # plain transformers loads it, and it is the base's model with that adapter
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(llama[0], dtype=torch.float32)
    plain.load_state_dict({name: value.float() for name, value in meant.items()})
    wanted = peft.PeftModel.from_pretrained(plain, llama[1]).eval()
    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        assert float((out(ids).logits - wanted(ids).logits).abs().max()) < 0.02
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert not (tmp_path / "out/quantize_config.json").exists()
    assert content(base) == before
    assert ps.verify(tmp_path / "out").tensors == len(meant)
    ps.unfold_checkpoint(tmp_path / "out", tmp_path / "back", base)
    before.pop("pytorch_model.bin")
    assert content(tmp_path / "back") == before


def test_only_the_plain_weights_of_a_quantised_base_are_touched_where_that_is_enough(
    tmp_path: Path, llama: tuple[Path, Path]
) -> None:
    base = shutil.copytree(llama[0], tmp_path / "base")
    quantised(base, "fp8", "mlp.up_proj")
    ps.fold_checkpoint(llama[1], base, tmp_path / "out")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.equal(before[n].float(), after[n].float())}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "down_proj"}
    assert (base / "config.json").read_bytes() == (tmp_path / "out/config.json").read_bytes()


def test_what_names_leave_open_is_planned_on_a_twin_of_the_base(
    tmp_path: Path, llama: tuple[Path, Path]
) -> None:
    base = shutil.copytree(llama[0], tmp_path / "base")
    meant = quantised(base, "gptq")
    plain = AutoModelForCausalLM.from_pretrained(llama[0], dtype=torch.float32)
    plain.load_state_dict({name: value.float() for name, value in meant.items()})
    plain.save_pretrained(tmp_path / "plain")
    lora = adapter_at(
        tmp_path / "lora", tmp_path / "plain", target_modules=["embed_tokens", "q_proj"]
    )
    wanted = peft.PeftModel.from_pretrained(plain, lora).merge_and_unload().state_dict()
    report = ps.fold_checkpoint(lora, base, tmp_path / "out", dtype="float32")
    for name, value in tensors_of(tmp_path / "out").items():
        assert torch.allclose(value, wanted[name], rtol=1e-5, atol=2e-6), name
    assert sum(each["relative"] > 0 for each in report.changed.values()) == 3
    said = json.loads((tmp_path / "out/peftsurgery.json").read_text())
    assert said["base"] == str(base)
    ps.unfold_checkpoint(tmp_path / "out", tmp_path / "back")
    assert tensors_of(tmp_path / "back").keys() == tensors_of(base).keys()


def test_shards_are_indexed_anew(tmp_path: Path, llama: tuple[Path, Path]) -> None:
    base = shutil.copytree(llama[0], tmp_path / "base")
    meant = quantised(base, "gptq")
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    # parts of one weight in two files
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    where = {name: shard for shard, mine in shards.items() for name in mine}
    for shard, mine in shards.items():
        save_file({name: tensors[name] for name in mine}, base / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    ps.fold_checkpoint(llama[1], base, tmp_path / "out")
    found = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert found["weight_map"].keys() == meant.keys()
    for name, shard in found["weight_map"].items():
        assert name in load_file(tmp_path / "out" / shard)
    sizes = sum(value.nbytes for value in tensors_of(tmp_path / "out").values())
    assert found["metadata"]["total_size"] == sizes


@pytest.mark.parametrize("damage", ["version", "part", "shape", "state", "method"])
def test_what_is_not_read_is_refused_by_code(
    tmp_path: Path, llama: tuple[Path, Path], damage: str
) -> None:
    base = shutil.copytree(llama[0], tmp_path / "base")
    quantised(base, {"version": "awq", "state": "nf4"}.get(damage, "gptq"))
    config = json.loads((base / "config.json").read_text())
    tensors = load_file(base / "model.safetensors")
    name = next(key for key in tensors if "q_proj" in key and key.endswith(("scales", "__nf4")))
    if damage == "version":
        config["quantization_config"]["version"] = "marlin"
    elif damage == "method":
        config["quantization_config"]["quant_method"] = "quanto"
    elif damage == "part":
        tensors.pop(name)
    elif damage == "shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    else:
        tensors[name] = torch.frombuffer(bytearray(b'{"shape": [64'), dtype=torch.uint8)
    (base / "config.json").write_text(json.dumps(config))
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SurgeryError, match=r"PSG(215|416)"):
        ps.fold_checkpoint(llama[1], base, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_quantised_base_has_no_residual(tmp_path: Path, llama: tuple[Path, Path]) -> None:
    base = shutil.copytree(llama[0], tmp_path / "base")
    quantised(base, "fp8")
    with pytest.raises(SurgeryError, match=r"PSG416.*quantised"):
        ps.fold_checkpoint(llama[1], base, tmp_path / "out", reversible=True)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
