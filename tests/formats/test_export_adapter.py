"""Exports for other programs, checked by what their files say; ``tools/readers`` runs the programs.

The oracle is what peft adds to the weights by the same adapter.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import CLIPTextConfig, CLIPTextModel

import peftsurgery as ps
from tests.checkpoint.loras import changes, llama


def moved(model: ps.OperatedModel) -> ps.OperatedModel:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def graph() -> Any:
    return ps.capture(llama())


@pytest.fixture(scope="module")
def lora(graph: Any) -> ps.OperatedModel:
    """A rank-stabilised LoRA of every linear, of two ranks."""
    settings = {"rank": 2, "alpha": 3, "stabilised": True}
    by = [{"where": {"layers": "1"}, "rank": 3}]
    return moved(ps.apply(graph, "lora_all_linear", settings=settings, by=by))


@pytest.fixture(scope="module")
def added(lora: ps.OperatedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What peft adds to each weight."""
    folder = tmp_path_factory.mktemp("peft") / "lora"
    ps.export_adapter(lora, folder, "peft")
    return {name: value.double().numpy() for name, value in changes(folder).items()}


def same(found: dict[str, Any], added: dict[str, Any]) -> None:
    assert found.keys() == added.keys()
    for name, value in added.items():
        assert np.abs(found[name] - value).max() < 1e-6, name


def test_vllm_gets_one_rank_and_one_scale_and_peft_reads_the_same(
    lora: ps.OperatedModel, added: dict[str, Any], tmp_path: Path
) -> None:
    assert ps.export_adapter(lora, tmp_path / "vllm", "vllm") == ()
    config = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "vllm" / "adapter_model.safetensors")
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (3, 3, True)
    ignored = ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save")
    assert not any(config.get(key) for key in ignored)
    assert config["bias"] == "none"
    assert {t.shape[0 if "lora_A" in name else 1] for name, t in tensors.items()} == {3}
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in tensors)
    same({n: v.double().numpy() for n, v in changes(tmp_path / "vllm").items()}, added)


def parsed(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys and tensors of a GGUF file, read as its specification says."""
    data, at = file.read_bytes(), 24
    magic, version, count, keys = struct.unpack_from("<4sIQQ", data)
    assert (magic, version) == (b"GGUF", 3)

    def taken(form: str) -> Any:
        nonlocal at
        values = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return values[0] if len(values) == 1 else values

    def text() -> str:
        nonlocal at
        size = taken("Q")
        at += size
        return data[at - size : at].decode()

    said = {text(): (text() if taken("I") == 8 else taken("f")) for _ in range(keys)}
    places = []
    for _ in range(count):
        name, dims = text(), taken("I")
        sizes = [taken("Q") for _ in range(dims)]
        kind, place = taken("I"), taken("Q")
        assert kind == 0
        assert place % 32 == 0
        places.append((name, sizes[::-1], place))
    start = -(-at // 32) * 32
    values = {
        name: np.frombuffer(data, "<f4", int(np.prod(shape)), start + place).reshape(shape)
        for name, shape, place in places
    }
    return said, values


NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def test_gguf_says_the_change_in_the_order_of_rows_that_llama_cpp_has(
    lora: ps.OperatedModel, added: dict[str, Any], tmp_path: Path
) -> None:
    ps.export_adapter(lora, tmp_path / "lora.gguf", "gguf")
    said, tensors = parsed(tmp_path / "lora.gguf")
    assert said["general.architecture"] == "llama"
    assert (said["general.type"], said["adapter.type"]) == ("adapter", "lora")
    found = {}
    for name in {name.rpartition(".")[0] for name in tensors}:
        _, layer, short, _ = name.split(".")
        down, up = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        alpha = said["adapter.lora.alpha"]
        change = (alpha / up.shape[1] if alpha else 1.0) * up.astype(float) @ down
        heads = {"attn_q": 4, "attn_k": 2}.get(short)
        if heads:  # llama.cpp's row 2 i + p of a head is transformers' row p d/2 + i
            half = len(change) // heads // 2
            order = [
                h * 2 * half + 2 * i + p for h in range(heads) for p in (0, 1) for i in range(half)
            ]
            change = change[order]
        found[f"model.layers.{layer}.{NAMES[short]}.weight"] = change
    same(found, added)


def test_mlx_gets_tensors_turned_of_one_rank_in_the_layers_it_counts(
    graph: Any, tmp_path: Path
) -> None:
    last = moved(ps.apply(graph, "lora_qv", rank=2, where={"layers": "1"}))
    ps.export_adapter(last, tmp_path / "mlx", "mlx")
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert config["num_layers"] == 1
    parameters = config["lora_parameters"]
    assert parameters["keys"] == ["self_attn.q_proj", "self_attn.v_proj"]
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    ps.export_adapter(last, tmp_path / "peft", "peft")
    found = {}
    for name in {name.rpartition(".")[0] for name in tensors}:
        a, b = tensors[f"{name}.lora_a"].astype(float), tensors[f"{name}.lora_b"]
        assert a.shape[1] == b.shape[0] == parameters["rank"]
        found[f"{name}.weight"] = parameters["scale"] * (a @ b).T
    same(found, {n: v.double().numpy() for n, v in changes(tmp_path / "peft").items()})


def test_kohya_gets_every_alpha_under_names_that_other_tools_know(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    encoder = CLIPTextModel(CLIPTextConfig(**sizes, num_hidden_layers=1, vocab_size=32)).eval()
    model = moved(ps.apply(ps.capture(encoder), "rslora", rank=3, alpha=5))
    (tmp_path / "there").mkdir()
    ps.export_adapter(model, tmp_path / "there", "kohya")
    tensors = load_file(tmp_path / "there" / "pytorch_lora_weights.safetensors")
    modules = {name.partition(".")[0] for name in tensors}
    start = "lora_te_text_model_encoder_layers_0_self_attn"
    assert modules == {f"{start}_q_proj", f"{start}_v_proj"}
    for module in modules:
        down, up = tensors[f"{module}.lora_down.weight"], tensors[f"{module}.lora_up.weight"]
        assert (down.shape, up.shape, tensors[f"{module}.alpha"].shape) == ((3, 16), (16, 3), ())
        assert tensors[f"{module}.alpha"] / 3 == pytest.approx(5 / np.sqrt(3))


@pytest.mark.parametrize("to", ["vllm", "gguf", "mlx"])
@pytest.mark.parametrize(
    ("rules", "code"),
    [("dora", "PSG520"), ("ia3", "PSG520"), ("adalora", "PSG510"), ("prefix_tuning", "PSG5")],
)
def test_what_is_no_plain_lora_is_refused_until_it_is_made_one(
    graph: Any, tmp_path: Path, rules: str, code: str, to: Any
) -> None:
    model = moved(ps.apply(graph, rules))
    with pytest.raises(ps.SurgeryError, match=code):
        ps.export_adapter(model, tmp_path / "out", to)
    assert list(tmp_path.iterdir()) == []
    if rules in ("dora", "ia3", "adalora"):
        ps.export_adapter(ps.as_lora(model), tmp_path / "out", to)
        assert (tmp_path / "out").exists()


def test_trained_parameters_and_two_adapters_are_refused(graph: Any, tmp_path: Path) -> None:
    normed = moved(ps.apply(graph, "lora_qv", train=["model.norm"]))
    for to in ("vllm", "gguf", "mlx"):
        with pytest.raises(ps.SurgeryError, match="PSG520"):
            ps.export_adapter(normed, tmp_path / "out", to)
    two = moved(ps.apply(ps.apply(graph, "lora_qv"), "lora_qv", name="second"))
    with pytest.raises(ps.SurgeryError, match="PSG511"):
        ps.export_adapter(two, tmp_path / "out", "gguf")
    ps.export_adapter(two, tmp_path / "out.gguf", "gguf", name="second")
    ps.export_adapter(ps.as_lora(two), tmp_path / "both.gguf", "gguf")


def test_tied_tables_and_unknown_architectures_are_refused(tmp_path: Path) -> None:
    tied = ps.capture(llama(tie_word_embeddings=True))
    for rules, settings in (("lora_embedding", {}), ("lora", {"roles": ["lm_head"]})):
        model = moved(ps.apply(tied, rules, settings=settings))
        for to in ("gguf", "mlx"):
            with pytest.raises(ps.SurgeryError, match="PSG521"):
                ps.export_adapter(model, tmp_path / "out", to)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval()
    plain = ps.capture(module, inputs=(torch.zeros(2, 4),))
    model = moved(ps.apply(plain, "lora_all_linear", rank=1))
    for to in ("gguf", "mlx", "kohya"):
        with pytest.raises(ps.SurgeryError, match="PSG522"):
            ps.export_adapter(model, tmp_path / "out", to)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_or_read_is_refused(lora: ps.OperatedModel, tmp_path: Path) -> None:
    (tmp_path / "taken.gguf").write_text("mine")
    with pytest.raises(ps.SurgeryError, match="PSG601"):
        ps.export_adapter(lora, tmp_path / "taken.gguf", "gguf")
    assert (tmp_path / "taken.gguf").read_text() == "mine"
    with pytest.raises(ps.SurgeryError, match="PSG603"):
        ps.export_adapter(lora, tmp_path / "missing" / "out", "vllm")
    with pytest.raises(ps.SurgeryError, match="PSG904"):
        ps.export_adapter(lora, tmp_path / "out", "keras")
    llama().save_pretrained(tmp_path / "base")
    based = moved(ps.apply(ps.capture(str(tmp_path / "base")), "lora_qv"))
    for to in ("vllm", "gguf", "mlx"):
        with pytest.raises(ps.SurgeryError, match="PSG602"):
            ps.export_adapter(based, tmp_path / "base", to, force=True)
