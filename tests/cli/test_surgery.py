"""apply and fold, from a model's directory to a model's directory."""

import hashlib
import os
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel

import peftsurgery as ps
from peftsurgery.formats.onnx import export as onnx_export
from peftsurgery.formats.onnx.file import OnnxFile
from tests.cli.conftest import small_bert

RULE = """
name: nowhere
rules:
  - match: linear
    where: {path: ".*no_such_module"}
    rewrite: 2 * y
    fold: {W: 2 * W, b: 2 * b}
"""


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def randomise(surgery: Path) -> dict[str, torch.Tensor]:
    """Give the adapter of a saved surgery other numbers than its start."""
    generator = torch.Generator().manual_seed(1)
    file = surgery / "adapter.safetensors"
    tensors = {
        name: torch.randn(value.shape, generator=generator)
        for name, value in load_file(file).items()
    }
    save_file(tensors, file)
    return tensors


def test_apply_narrows_every_rule_by_layers_roles_and_path(
    run: Any, bert: Path, tmp_path: Path
) -> None:
    narrowing = ("--layers", "1..", "--roles", "attn.q,attn.v", "--path", r".*(query|q_proj)")
    line = ("apply", bert, "lora_qv", *narrowing, "-o", tmp_path / "narrow", "--json")
    (match,) = run(*line).json["matches"]
    assert match["role"] == "attn.q"
    assert ".1." in match["module"]
    printed = run("inspect", tmp_path / "narrow").out
    assert "only where role attn.q or attn.v and path .*(query|q_proj) and layers 1.." in printed
    answer = run("why", tmp_path / "narrow", "lora_qv", match["module"].replace(".1.", ".0."))
    assert "layer 0" in answer.out
    refused = run("apply", bert, "lora_qv", "--layers", "90..", "--dry-run", "--json")
    assert (refused.code, refused.json["error"]["code"]) == (1, "PSG301")
    wrong = run("apply", "no/model", "lora_qv", "--layers", "x", "--dry-run", "--json")
    assert wrong.json["error"]["code"] == "PSG106", "before the model is looked for"


def test_a_dry_run_reports_and_writes_nothing(run: Any, bert: Path, tmp_path: Path) -> None:
    outcome = run("apply", bert, "lora_qv", "--dry-run", "--json")
    assert outcome.code == 0, outcome.out
    matches = outcome.json["matches"]
    assert [match["module"].rpartition(".")[2] for match in matches] == ["query", "value"] * 2
    # per site: A (8, 32) and B (32, 8)
    assert outcome.json["trainable"] == 4 * (8 * 32 + 32 * 8)
    assert list(tmp_path.iterdir()) == []


def test_what_a_rule_will_do_is_shown_before_it_is_written(
    run: Any, bert: Path, tmp_path: Path
) -> None:
    line = "+ encoder.layer.{0..1}.attention.self.query: lora_qv(rank 4) on attn.q ×2"
    command = ("apply", bert, "lora_qv", "--set", "rank=4", "--diff")
    outcome = run(*command, "--dry-run")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(f"{bert} → {bert} with lora_qv\n")
    assert outcome.out.index(line) < outcome.out.index("nothing was written")
    document = run(*command, "-o", tmp_path / "out", "--json").json
    assert document["out"] == str(tmp_path / "out")
    assert (tmp_path / "out").is_dir()
    found = document["diff"]
    assert found["schema"] == "peftsurgery.diff/1"
    added = [each["where"] for each in found["changes"] if each["part"] == "insertion"]
    assert added == [f"encoder.layer.{{0..1}}.attention.self.{part}" for part in ("query", "value")]
    more = found["headline"]["b"]["parameters"] - found["headline"]["a"]["parameters"]
    assert more == document["trainable"]


@pytest.mark.parametrize("seed", [2**70, 2**64, -(2**63) - 1])
def test_a_seed_that_torch_does_not_take_is_refused_before_the_capture(
    run: Any, bert: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftsurgery.cli.model.open_model", pytest.fail)
    assert run("apply", bert, "lora_qv", "--dry-run", f"--seed={seed}").code == 2
    torch.Generator().manual_seed(2**64 - 1)  # what is allowed is taken
    torch.Generator().manual_seed(-(2**63))


def test_settings_and_the_adapters_name_reach_the_rule(run: Any, bert: Path) -> None:
    outcome = run(
        "apply", bert, "lora_qv", "--set", "rank=2", "--name", "mine", "--dry-run", "--json"
    )
    added = outcome.json["added"]
    assert added["encoder.layer.0.attention.self.query.mine.A"] == [2, 32]
    assert added["encoder.layer.1.attention.self.value.mine.B"] == [32, 2]


def test_several_rules_are_applied_in_turn(run: Any, bert: Path) -> None:
    outcome = run("apply", bert, "lora_qv", "lora_embedding", "--dry-run", "--json")
    assert {match["rule"] for match in outcome.json["matches"]} == {"lora_qv", "lora_embedding"}


def test_what_is_applied_and_folded_is_the_formula_of_the_paper(
    run: Any, bert: Path, tmp_path: Path
) -> None:
    before = digest(bert)
    surgery, folded = tmp_path / "surgery", tmp_path / "folded"
    assert run("apply", bert, "lora_qv", "-o", surgery, "--set", "alpha=4").code == 0
    adapter = randomise(surgery)
    outcome = run("fold", surgery, "-o", folded, "--verify", "--json")
    assert outcome.code == 0, outcome.out
    assert outcome.json["verified"] < 1e-5
    assert digest(bert) == before

    base, new = BertModel.from_pretrained(bert), BertModel.from_pretrained(folded)
    for name, weight in base.named_parameters():
        module = name.removesuffix(".weight")
        expected = weight
        if f"{module}.lora_qv.A" in adapter:
            product = adapter[f"{module}.lora_qv.B"] @ adapter[f"{module}.lora_qv.A"]
            expected = weight + 4 / 8 * product
        torch.testing.assert_close(new.get_parameter(name), expected, rtol=0, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folded", "surgery"]


def test_a_saved_surgery_is_a_model_like_any_other(run: Any, bert: Path, tmp_path: Path) -> None:
    surgery = tmp_path / "surgery"
    run("apply", bert, "lora_qv", "-o", surgery)
    outcome = run("apply", surgery, "lora_embedding", "--dry-run", "--json")
    assert {match["rule"] for match in outcome.json["matches"]} == {"lora_qv", "lora_embedding"}


def test_a_surgery_finds_its_base_from_another_directory(
    run: Any, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bert.parent)
    run("apply", bert.name, "lora_qv", "-o", tmp_path / "surgery")
    monkeypatch.chdir(tmp_path)
    outcome = run("fold", "surgery", "-o", "folded", "--allow-unchanged")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "folded" / "config.json").is_file()


def test_a_rule_without_a_match_ends_with_1_and_leaves_nothing(
    run: Any, bert: Path, tmp_path: Path
) -> None:
    rule = tmp_path / "nowhere.yaml"
    rule.write_text(RULE)
    outcome = run("apply", bert, rule, "-o", tmp_path / "surgery")
    assert outcome.code == 1
    assert "PSG301" in outcome.err
    assert "nearest miss" in outcome.err
    assert list(tmp_path.iterdir()) == [rule]


def test_a_fifo_in_a_surgery_is_not_waited_for(run: Any, bert: Path, tmp_path: Path) -> None:
    surgery = tmp_path / "surgery"
    run("apply", bert, "lora_qv", "-o", surgery)
    for file, code in (("adapter.safetensors", "PSG606"), ("surgery.json", "PSG607")):
        (surgery / file).unlink()
        os.mkfifo(surgery / file)
        outcome = run("fold", surgery, "-o", tmp_path / "folded", "--json")
        assert (outcome.code, outcome.json["error"]["code"]) == (3, code)
        assert not (tmp_path / "folded").exists()


@pytest.mark.parametrize("place", [".", "inside"])
def test_the_model_is_not_written_into(run: Any, bert: Path, place: str) -> None:
    before = digest(bert)
    outcome = run("apply", bert, "lora_qv", "-o", bert / place, "--force", "--json")
    assert outcome.json["error"]["code"] == "PSG602"
    assert digest(bert) == before


@pytest.mark.slow
def test_an_onnx_file_may_lie_in_the_folded_directory(run: Any, bert: Path, tmp_path: Path) -> None:
    surgery, folded = tmp_path / "surgery", tmp_path / "folded"
    run("apply", bert, "lora_qv", "-o", surgery)
    file = folded / "model.onnx"
    outcome = run("fold", surgery, "-o", folded, "--onnx", file, "--json")
    assert outcome.code == 0, outcome.out
    assert outcome.json["onnx"]["path"] == str(file)
    assert outcome.json["onnx"]["difference"] < 1e-5
    assert file.is_file()


@pytest.mark.slow
def test_one_of_several_adapters_is_folded_by_name(run: Any, bert: Path, tmp_path: Path) -> None:
    surgery, folded = tmp_path / "surgery", tmp_path / "folded"
    run("apply", bert, "lora_qv", "lora_embedding", "-o", surgery)
    randomise(surgery)
    outcome = run("fold", surgery, "-o", folded, "--adapter", "lora_embedding", "--json")
    assert outcome.json["adapters"] == ["lora_embedding"]
    assert {change["name"] for change in outcome.json["changed"]} == {
        "embeddings.word_embeddings.weight"
    }
    outcome = run("fold", surgery, "-o", tmp_path / "other", "--adapter", "lora_kv", "--json")
    assert outcome.json["error"]["code"] == "PSG310"


@pytest.mark.slow
def test_layers_stay_left_out_of_an_adapter_that_a_command_names(
    run: Any, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ps.apply(ps.capture(str(bert)), "lora_qv", name="a")
    model = ps.apply(model, "lora_attention", name="b")
    model.activate("a", leave_out=[0])
    model.save(tmp_path / "surgery")
    randomise(tmp_path / "surgery")
    folded = tmp_path / "folded"
    outcome = run("fold", tmp_path / "surgery", "-o", folded, "--adapter", "a", "--json")
    changed = [change["name"] for change in outcome.json["changed"]]
    assert changed
    assert not any(".layer.0." in name for name in changed)
    given: list[ps.OperatedModel] = []

    def export_onnx(model: ps.OperatedModel, *_: Any) -> OnnxFile:
        given.append(model)
        return OnnxFile("", None, {}, (), 0.0, "float32")

    monkeypatch.setattr(onnx_export, "export_onnx", export_onnx)
    where = ("--to", "onnx", "--name", "a", "-o", tmp_path / "model.onnx")
    assert run("export", tmp_path / "surgery", *where).code == 0
    assert [(each.active, each.left_out) for each in given] == [(("a",), {"a": [0]})]


def quantised(weight: torch.Tensor) -> torch.Tensor:
    """What a weight is once it went through four bits and two quantisations of its scales."""
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    dense: torch.Tensor = bnb.functional.dequantize_4bit(packed, state)
    return dense


@pytest.mark.slow
def test_four_bits_are_folded_into_full_precision_or_four_bits_again(
    run: Any, tmp_path: Path
) -> None:
    bert = small_bert(tmp_path / "bert", width=64)  # bitsandbytes takes no narrower ones on AVX-512
    surgery, folded, packed = (tmp_path / name for name in ("surgery", "folded", "packed"))
    run("apply", bert, "qlora", "-o", surgery, "--set", "rank=2", "--set", "alpha=2")
    adapter = {name: value / 10 for name, value in randomise(surgery).items()}
    save_file(adapter, surgery / "adapter.safetensors")
    outcome = run("fold", surgery, "-o", folded, "--verify", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["error"]["largest"] == 0, "the base is in fp32, and so is the sum"
    again = run("fold", surgery, "-o", packed, "--requantise", "--verify", "--json")
    assert again.code == 0, again.err
    assert again.json["changed"] == outcome.json["changed"]
    assert len(again.json["changed"]) == 13

    base, dense, small = (BertModel.from_pretrained(path) for path in (bert, folded, packed))
    gaps = []
    for change in again.json["changed"]:
        module = change["name"].removesuffix(".weight")
        update = adapter[f"{module}.qlora.B"] @ adapter[f"{module}.qlora.A"]
        expected = quantised(base.get_submodule(module).weight.data) + update
        assert isinstance(small.get_submodule(module), bnb.nn.Linear4bit)
        stored = small.get_submodule(module).weight
        read = bnb.functional.dequantize_4bit(stored.data, stored.quant_state)
        torch.testing.assert_close(dense.get_submodule(module).weight.data, expected)
        torch.testing.assert_close(read, quantised(expected))
        gaps.append((read - expected).abs().max().item())
    assert again.json["error"]["largest"] == pytest.approx(max(gaps), rel=1e-3)


def test_what_is_not_in_four_bits_is_not_quantised_again(
    run: Any, bert: Path, tmp_path: Path
) -> None:
    run("apply", bert, "lora_qv", "-o", tmp_path / "surgery")
    outcome = run("fold", tmp_path / "surgery", "-o", tmp_path / "folded", "--requantise")
    assert outcome.code == 3
    assert "PSG407" in outcome.err
    assert not (tmp_path / "folded").exists()


def test_fold_refuses_what_holds_no_adapter(run: Any, bert: Path, tmp_path: Path) -> None:
    outcome = run("fold", bert, "-o", tmp_path / "folded", "--json")
    assert outcome.json["error"]["code"] == "PSG607"
    assert outcome.code == 3
    assert list(tmp_path.iterdir()) == []
