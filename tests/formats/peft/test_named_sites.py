"""Plans of folds by names alone: where they answer, the answer is peft's; else there is none."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peftsurgery as ps
from peftsurgery.checkpoint.plan import SiteFold
from peftsurgery.errors import SurgeryError
from peftsurgery.formats.captured_plan import captured_plan
from peftsurgery.formats.peft.named_plan import named_plan
from tests.formats.stored import adapter_at, base_at, tensors_of

SMALL = {"intermediate_size": 48, "tie_word_embeddings": False}


def plan(adapter: Path, base: Path) -> dict[str, SiteFold] | None:
    found = named_plan(adapter, str(base))
    return None if found is None else {site.module: site for site in found.plan.sites}


@pytest.mark.parametrize(
    ("kind", "more", "config"),
    [
        ("Llama", SMALL, {"target_modules": ["q_proj", "k_proj", "down_proj"]}),
        ("Llama", SMALL, {"target_modules": ["q_proj", "gate_proj"], "use_dora": True}),
        ("Llama", SMALL, {"target_modules": ["v_proj", "o_proj"], "use_rslora": True}),
        ("GPT2", {}, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        (
            "Phi3",
            SMALL,
            {"target_modules": ["qkv_proj"], "rank_pattern": {"0.self_attn.qkv_proj": 5}},
        ),
    ],
    ids=["lora", "dora", "rslora", "turned", "ranks"],
)
def test_what_is_folded_by_names_is_what_peft_merges(
    tmp_path: Path, kind: str, more: dict[str, Any], config: dict[str, Any]
) -> None:
    base = base_at(tmp_path / "base", kind, torch.float32, "40KB", **more)
    adapter = adapter_at(tmp_path / "lora", base, **config)
    assert plan(adapter, base) is not None
    ps.fold_checkpoint(adapter, base, tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(base)
    merged = peft.PeftModel.from_pretrained(original, adapter).merge_and_unload().state_dict()
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    for name, value in after.items():
        assert torch.allclose(value, merged[name], rtol=1e-5, atol=2e-6), name


def test_other_methods_are_read_too(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", "Llama", torch.float32, "1GB", **SMALL)
    model = AutoModelForCausalLM.from_pretrained(base)
    wanted = ["k_proj", "v_proj", "down_proj"]
    ia3 = peft.IA3Config(target_modules=wanted, feedforward_modules=["down_proj"])
    wrapped = peft.get_peft_model(model, ia3)
    for name, value in wrapped.named_parameters():
        if "ia3" in name:
            value.data.copy_(torch.rand(value.shape, generator=torch.manual_seed(3)) + 0.5)
    wrapped.save_pretrained(tmp_path / "ia3")
    sites = plan(tmp_path / "ia3", base)
    assert sites is not None
    assert {site.rows is None for site in sites.values()} == {False}
    ps.fold_checkpoint(tmp_path / "ia3", base, tmp_path / "out")
    merged = wrapped.merge_and_unload().state_dict()
    assert all(
        torch.allclose(v, merged[n], atol=1e-6) for n, v in tensors_of(tmp_path / "out").items()
    )
    # one module listed with the wrong side scaled is for the capture to refuse
    edited(tmp_path / "ia3", feedforward_modules=["v_proj"])
    assert plan(tmp_path / "ia3", base) is None


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("named")
    base = base_at(root / "base", "Llama", torch.bfloat16, "20KB", **SMALL)
    return base, adapter_at(root / "lora", base, target_modules=["q_proj", "up_proj"])


def test_a_plan_by_names_is_the_plan_by_the_graph(tmp_path: Path, llama: tuple[Path, Path]) -> None:
    base, adapter = llama
    sites = plan(adapter, base)
    graph = captured_plan(adapter, str(base), False, tmp_path)
    assert sites is not None
    assert {site.module for site in graph.plan.sites} == sites.keys()
    learnt = load_file(tmp_path / "adapter.safetensors")
    stored = load_file(adapter / "adapter_model.safetensors")
    for theirs in graph.plan.sites:
        mine = sites[theirs.module]
        assert (mine.weights, mine.turned, mine.rows) == (
            theirs.weights,
            theirs.turned,
            theirs.rows,
        )
        assert mine.numbers == {**theirs.numbers, "roles": mine.numbers["roles"]}
        assert {str(text) for text in mine.fold.values()} == {str(t) for t in theirs.fold.values()}
        for name, key in mine.parameters.items():
            assert torch.equal(stored[key], learnt[theirs.parameters[name]])
    named = named_plan(adapter, str(base))
    assert named is not None
    mine, theirs = named.plan.record, graph.plan.record
    for key in ("base", "fingerprint", "versions"):
        assert mine[key] == theirs[key]
    assert [entry["content"] for entry in mine["folded"]] == [
        entry["content"] for entry in theirs["folded"]
    ]


def edited(adapter: Path, **values: Any) -> None:
    """Write other values into an adapter's config."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": ["q_proj", "up_proj", "v_proj"]},  # tensors are missing
        {"target_modules": ["q_proj"]},  # there are more
        {"target_modules": "all-linear"},
        {"modules_to_save": ["q_proj"]},
        {"r": 4},
        {"rank_pattern": {"q_proj": 2}},
    ],
    ids=["missing", "more", "all", "saved", "rank", "pattern"],
)
def test_a_config_that_does_not_fit_the_tensors_is_left_to_the_capture(
    tmp_path: Path, llama: tuple[Path, Path], change: dict[str, Any]
) -> None:
    adapter = shutil.copytree(llama[1], tmp_path / "lora")
    edited(adapter, **change)
    assert plan(adapter, llama[0]) is None


@pytest.mark.parametrize(
    "change", ["folded", "shape", "name", "own", "tokens", "tied", "no config"]
)
def test_what_names_leave_open_is_left_to_the_capture(
    tmp_path: Path, llama: tuple[Path, Path], change: str
) -> None:
    base, adapter = (shutil.copytree(each, tmp_path / each.name) for each in llama)
    learnt = load_file(adapter / "adapter_model.safetensors")
    first, config = next(iter(learnt)), json.loads((base / "config.json").read_text())
    if change == "folded":
        (base / "peftsurgery.json").write_text("{}")
    elif change == "shape":
        learnt[first] = learnt[first][:, :-1].contiguous()
    elif change == "name":
        learnt = {key.replace("layers.1", "layers.7"): value for key, value in learnt.items()}
    elif change == "own":
        learnt["base_model.model.model.norm.weight"] = torch.ones(32)
    elif change == "tokens":
        tokens = {"added_tokens": [{"id": config["vocab_size"], "content": "<new>"}]}
        (adapter / "tokenizer.json").write_text(json.dumps(tokens))
    elif change == "tied":
        # a square weight of as many rows as there are tokens may be a table of them
        config |= {"tie_word_embeddings": True, "vocab_size": 48}
        (base / "config.json").write_text(json.dumps(config))
    else:
        (base / "config.json").unlink()
    save_file(learnt, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    assert plan(adapter, base) is None


def test_a_square_weight_lies_as_the_biased_ones_of_its_model_do(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", "GPT2", torch.float32, "1GB")
    adapter = adapter_at(tmp_path / "lora", base, target_modules=[r"attn.c_proj"])
    sites = plan(adapter, base)
    assert sites is not None
    assert all(site.turned == {"W"} for site in sites.values())
    # without another biased weight to go by, it may lie either way
    tensors = {n: v for n, v in tensors_of(base).items() if "attn.c_proj" in n or ".bias" not in n}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert plan(adapter, base) is None
    # and where it has no bias, it is a plain linear
    tensors = {name: value for name, value in tensors.items() if ".bias" not in name}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    sites = plan(adapter, base)
    assert sites is not None
    assert all(not site.turned for site in sites.values())


def test_a_base_without_the_head_is_called_by_its_own_names(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", "Llama", torch.float32, "1GB", **SMALL)
    adapter = adapter_at(tmp_path / "lora", base, target_modules=["q_proj"])
    tensors = {n.removeprefix("model."): v for n, v in tensors_of(base).items() if "head" not in n}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    sites = plan(adapter, base)
    assert sites is not None
    assert {site.weights["W"] for site in sites.values()} <= tensors.keys()
    # the other way round: an adapter of the model without its head
    learnt = load_file(adapter / "adapter_model.safetensors")
    short = {key.replace("model.model.model.", "model.model."): v for key, v in learnt.items()}
    save_file(short, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    longer = {f"model.{name}": value for name, value in tensors.items()}
    save_file(longer, base / "model.safetensors", metadata={"format": "pt"})
    sites = plan(adapter, base)
    assert sites is not None
    assert {site.weights["W"] for site in sites.values()} <= longer.keys()


def test_an_adapter_with_nan_is_refused_by_the_name_of_its_tensor(
    tmp_path: Path, llama: tuple[Path, Path]
) -> None:
    adapter = shutil.copytree(llama[1], tmp_path / "lora")
    learnt = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(learnt))
    learnt[name][0, 0] = np.nan
    save_file(learnt, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SurgeryError, match="PSG505") as refused:
        ps.fold_checkpoint(adapter, llama[0], tmp_path / "out")
    assert name in refused.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_a_fold_by_names_imports_neither_torch_nor_the_schema(
    tmp_path: Path, llama: tuple[Path, Path]
) -> None:
    base, adapter = llama
    code = (
        "import sys; from peftsurgery.cli.root import root; "
        "rc = 0\ntry: root(sys.argv[1:])\nexcept SystemExit as e: rc = e.code\n"
        "heavy = {'torch', 'transformers', 'safetensors', 'pydantic'}\n"
        "print(rc, sorted(heavy & sys.modules.keys()))"
    )
    asked = ["fold", str(adapter), "--base", str(base), "-o", str(tmp_path / "out")]
    for more in ("--dry-run", "--stream"):
        run = [sys.executable, "-c", code, *asked, more]
        done = subprocess.run(run, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "0 []", done.stderr
        assert (tmp_path / "out").exists() == (more == "--stream")
