"""Models that compressed-tensors writes: folded into plain weights or in their format again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils.helpers import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import peftsurgery as ps
from peftsurgery.cli.root import root
from peftsurgery.errors import SurgeryError
from tests.checkpoint.codecs.test_coded import SMALL
from tests.formats.stored import ALPHA, RANK, adapter_at, base_at, content, tensors_of

INT4 = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
INT8 = {"num_bits": 8, "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
BY_TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor"}
SCHEMES: dict[str, dict[str, Any]] = {
    "W4A16": {"weights": INT4},
    "W8A8": {"weights": INT8, "input_activations": BY_TOKEN},
    "FP8": {"weights": FP8, "input_activations": STATIC},
}


def quantised_at(folder: Path, base: Path, *groups: dict[str, Any]) -> Path:
    """A base as the package quantises it, by the least and the largest value of each group."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    named = {f"group_{n}": {"targets": ["Linear"], **each} for n, each in enumerate(groups)}
    config = QuantizationConfig(config_groups=named, ignore=["lm_head", "re:.*k_proj"])
    apply_quantization_config(model, config)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        args = scheme.weights
        blocks = module.weight.reshape(
            len(module.weight), -1, args.group_size or SMALL["hidden_size"]
        )
        scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
        module.weight_scale.data = scale
        module.weight_zero_point.data = zero
        if hasattr(module, "input_scale"):
            module.input_scale.data.fill_(0.5)
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


def dequantised(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that transformers and the package read in a directory."""
    asked = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked)
    return {name: value for name, value in model.state_dict().items() if name.endswith("weight")}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("compressed")
    base = base_at(root / "base", "Llama", torch.bfloat16, "1GB", **SMALL)
    targets = ["q_proj", "k_proj", "down_proj"]
    return base, adapter_at(root / "lora", base, target_modules=targets)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_fold_adds_to_what_transformers_reads_and_leaves_nothing_of_the_quantiser(
    tmp_path: Path, llama: tuple[Path, Path], name: str
) -> None:
    base = quantised_at(tmp_path / "base", llama[0], SCHEMES[name])
    before, meant = content(base), dequantised(base)
    ps.fold_checkpoint(llama[1], base, tmp_path / "out", dtype="float32")
    after = tensors_of(tmp_path / "out")
    assert after.keys() == meant.keys()
    learnt = load_file(llama[1] / "adapter_model.safetensors")
    for key, value in after.items():
        path = f"base_model.model.{key.removesuffix('.weight')}.lora_"
        if f"{path}A.weight" in learnt:
            change = learnt[f"{path}B.weight"].double() @ learnt[f"{path}A.weight"].double()
            value = value.double() - ALPHA / RANK * change
        # the package rounds to bfloat16 what is read in fp32 here
        torch.testing.assert_close(value, meant[key].to(value.dtype), rtol=2**-7, atol=1e-6)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ps.unfold_checkpoint(tmp_path / "out", tmp_path / "back", base)
    assert content(tmp_path / "back") == before


@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_loads_what_is_quantised_again(
    tmp_path: Path, llama: tuple[Path, Path], name: str
) -> None:
    base = quantised_at(tmp_path / "base", llama[0], SCHEMES[name])
    ps.fold_checkpoint(llama[1], base, tmp_path / "plain")
    report = ps.fold_checkpoint(llama[1], base, tmp_path / "again", requantise=True)
    assert (tmp_path / "again/config.json").read_bytes() == (base / "config.json").read_bytes()
    plain, again = tensors_of(tmp_path / "plain"), dequantised(tmp_path / "again")
    assert plain.keys() == again.keys()
    for key, value in plain.items():
        far = (again[key].float() - value.float()).norm() / value.float().norm()
        assert far < (0.12 if name == "W4A16" else 0.05), key
    assert report.to_dict()["requantised"]["weights"] == 4


def test_a_fold_of_what_is_ignored_leaves_the_rest_quantised(
    tmp_path: Path, llama: tuple[Path, Path]
) -> None:
    base = quantised_at(tmp_path / "base", llama[0], SCHEMES["W4A16"])
    lora = adapter_at(tmp_path / "lora", llama[0], target_modules=["k_proj"])
    ps.fold_checkpoint(lora, base, tmp_path / "out")
    was, now = tensors_of(base), tensors_of(tmp_path / "out")
    assert was.keys() == now.keys()
    changed = {name for name in was if not torch.equal(was[name], now[name])}
    assert {name.split(".")[-2] for name in changed} == {"k_proj"}
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()


def edited(base: Path, edit: Any) -> None:
    """Change the tensors and the quantiser's config of a base."""
    tensors = load_file(base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    edit(tensors, config["quantization_config"])
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps(config))


def test_scales_of_a_cache_stay_beside_quantised_weights_only(
    tmp_path: Path, llama: tuple[Path, Path]
) -> None:
    base = quantised_at(tmp_path / "base", llama[0], SCHEMES["FP8"])
    scales = {f"model.layers.{n}.self_attn.{k}_scale": torch.ones(1) for n in (0, 1) for k in "kv"}

    def edit(tensors: dict[str, torch.Tensor], said: dict[str, Any]) -> None:
        tensors |= scales
        said["kv_cache_scheme"] = STATIC

    edited(base, edit)
    before = content(base)
    ps.fold_checkpoint(llama[1], base, tmp_path / "again", requantise=True)
    assert scales.keys() <= tensors_of(tmp_path / "again").keys()
    ps.fold_checkpoint(llama[1], base, tmp_path / "out")
    assert scales.keys().isdisjoint(tensors_of(tmp_path / "out"))
    assert ps.verify(tmp_path / "out").tensors == len(tensors_of(tmp_path / "out"))
    ps.unfold_checkpoint(tmp_path / "out", tmp_path / "back", base)
    assert content(tmp_path / "back") == before


Q, UP = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.up_proj"))


@pytest.mark.parametrize(
    ("name", "edit", "why"),
    [
        ("W4A16", lambda t, c: c.update(config_groups={}), "without config_groups"),
        ("W4A16", lambda t, c: c.pop("config_groups"), "without config_groups"),
        ("W4A16", lambda t, c: c.update(transform_config={"a": 1}), "rotated"),
        (
            "W4A16",
            lambda t, c: [
                c.update(format="marlin-24"),
                c["config_groups"]["group_0"].pop("format"),
            ],
            "the format 'marlin-24'",
        ),
        (
            "W4A16",
            lambda t, c: c["config_groups"]["group_0"]["weights"].update(strategy="ring"),
            "'ring'",
        ),
        ("W4A16", lambda t, c: t.pop(f"{Q}.weight_scale"), f"no '{Q}.weight_scale'"),
        ("W4A16", lambda t, c: t.pop(f"{UP}.weight_scale"), f"no '{UP}.weight_scale'"),
        ("FP8", lambda t, c: t.pop(f"{Q}.weight_scale"), f"no '{Q}.weight_scale'"),
        ("FP8", lambda t, c: t.pop(f"{UP}.weight_scale"), f"no '{UP}.weight_scale'"),
        (
            "FP8",
            lambda t, c: c["config_groups"]["group_0"]["weights"].update(strategy="tensor"),
            "weight_scale is [64, 1], not [1, 1]",
        ),
    ],
)
def test_a_base_that_is_not_read_is_refused_with_the_reason(
    tmp_path: Path, llama: tuple[Path, Path], name: str, edit: Any, why: str
) -> None:
    base = quantised_at(tmp_path / "base", llama[0], SCHEMES[name])
    edited(base, edit)
    with pytest.raises(SurgeryError) as raised:
        ps.fold_checkpoint(llama[1], base, tmp_path / "out")
    assert raised.value.code == "PSG416"
    assert why in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_what_is_not_read_and_not_changed_stays_where_the_rest_is_quantised_again(
    tmp_path: Path, llama: tuple[Path, Path]
) -> None:
    base = quantised_at(tmp_path / "base", llama[0], SCHEMES["W4A16"])
    edited(base, lambda tensors, said: tensors.pop(f"{UP}.weight_scale"))
    ps.fold_checkpoint(llama[1], base, tmp_path / "out", requantise=True)
    was, now = tensors_of(base), tensors_of(tmp_path / "out")
    assert torch.equal(was[f"{UP}.weight_packed"], now[f"{UP}.weight_packed"])
    shutil.rmtree(tmp_path / "out")
    edited(base, lambda tensors, said: tensors.pop(f"{Q}.weight_scale"))
    with pytest.raises(SurgeryError, match=r"PSG416.*weight_scale"):
        ps.fold_checkpoint(llama[1], base, tmp_path / "out", requantise=True)
    edited(base, lambda tensors, said: said.pop("config_groups"))
    with pytest.raises(SurgeryError, match=r"PSG416.*without config_groups"):
        ps.fold_checkpoint(llama[1], base, tmp_path / "out", requantise=True)


def test_the_command_says_what_is_not_read_and_writes_nothing(
    tmp_path: Path, llama: tuple[Path, Path]
) -> None:
    base = quantised_at(tmp_path / "base", llama[0], SCHEMES["W4A16"])
    edited(base, lambda tensors, said: said.update(sparsity_config={"format": "sparse-bitmask"}))
    asked = ["fold", str(llama[1]), "--base", str(base), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(root, asked)
    assert done.exit_code == 3
    assert "PSG416" in done.stderr
    assert "the sparse format 'sparse-bitmask'" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
