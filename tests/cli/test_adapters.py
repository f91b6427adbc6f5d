"""extract, merge and import, as a user calls them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint.loras import llama, saved_lora


def test_an_adapter_is_extracted_and_merged_with_itself(run: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = saved_lora(tmp_path / "a=b")  # a name that looks like a weight
    llama().save_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(llama(), str(folder)).merge_and_unload()
    model.save_pretrained(tmp_path / "tuned")
    outcome = run("extract", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "x", "--json")
    assert outcome.code == 0, outcome.out
    assert outcome.json["schema"] == "peftsurgery.extract/1"
    assert {layer["rank"] for layer in outcome.json["layers"].values()} == {3}
    given = (f"{tmp_path / 'x'}=0.5", folder, "--base", tmp_path / "base")
    outcome = run("merge", *given, "-o", tmp_path / "m", "--how", "svd", "--json")
    assert outcome.code == 0, outcome.out
    assert outcome.json["schema"] == "peftsurgery.merge/1"
    assert set(outcome.json["ranks"].values()) == {3}
    outcome = run("merge", *given, "-o", tmp_path / "n")
    assert "rank 6" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code"),
    [
        (("merge", "nowhere=0.5"), "PSG501", 3),
        (("merge", "nowhere=much"), "PSG901", 2),
        (("merge", "one", "one=2"), "PSG901", 2),
        (("merge", "one=nan"), "PSG317", 2),
        (("extract", "nowhere", "nowhere"), "PSG205", 3),
        (("extract", "one", "two", "--rank", "2", "--energy", "0.5"), "PSG901", 2),
        (("import", "nowhere", "--base", "nowhere"), "PSG505", 3),
        (("import", "nowhere"), "PSG901", 2),
    ],
)
def test_refusals_have_codes_and_leave_nothing(
    run: Any, tmp_path: Path, arguments: tuple[str, ...], code: str, exit_code: int
) -> None:
    outcome = run(*arguments, "-o", tmp_path / "out", "--json")
    assert outcome.json["error"]["code"] == code
    assert list(tmp_path.iterdir()) == []


def test_another_programs_lora_is_imported_and_other_commands_lead_there(
    run: Any, tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path / "base")
    name, file = "model.layers.0.self_attn.q_proj", tmp_path / "adapters.safetensors"
    tensors = {f"{name}.lora_a": torch.ones(16, 2), f"{name}.lora_b": torch.ones(2, 16)}
    save_file(tensors, file)
    outcome = run("fold", file, "--base", tmp_path / "base", "-o", tmp_path / "out", "--json")
    assert "`peftsurgery import` reads it" in outcome.json["error"]["hint"]
    arguments = ("import", file, "--base", tmp_path / "base", "-o", tmp_path / "out")
    outcome = run(*arguments, "--json")
    assert outcome.code == 0, outcome.out
    assert outcome.json["schema"] == "peftsurgery.import/1"
    assert outcome.json["ranks"] == {name: 2}
    assert run("fold", tmp_path / "out", "-o", tmp_path / "folded").code == 0
    assert run(*arguments).code == 3  # OUT is there already
    assert "1 layers of rank 2" in run(*arguments, "--force").out


def changed(folder: Path, **values: object) -> None:
    """Put other values into an adapter's config."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("program", "values", "does"),
    [
        ("vllm", {"use_dora": True}, ["refuses"]),
        ("vllm", {"bias": "all", "modules_to_save": ["lm_head"]}, ["refuses", "refuses"]),
        ("vllm", {"alpha_pattern": {"q_proj": 3}}, ["ignores"]),
        ("vllm", {"r": 1024}, ["refuses"]),
        ("llama.cpp", {"use_rslora": True, "alpha_pattern": {"q_proj": 3}}, ["misreads"] * 2),
        ("llama.cpp", {"use_rslora": False}, []),
        ("peft", {}, []),
    ],
)
def test_what_a_program_does_otherwise_is_told(
    run: Any, tmp_path: Path, program: str, values: dict[str, Any], does: list[str]
) -> None:
    folder = saved_lora(tmp_path / "lora")
    changed(folder, **values)
    outcome = run("check", folder, "--for", program, "--json")
    assert [finding["does"] for finding in outcome.json["findings"]] == does
    assert outcome.json["schema"] == "peftsurgery.check/1"
    assert outcome.code == (1 if does else 0)


def test_modules_that_a_base_lacks_are_told_and_programs_that_are_not_known_refused(
    run: Any, tmp_path: Path
) -> None:
    folder = saved_lora(tmp_path / "lora")
    llama(num_hidden_layers=1).save_pretrained(tmp_path / "short")
    outcome = run("check", folder, "--for", "vllm", "--base", tmp_path / "short")
    assert outcome.code == 1
    assert "layers.1.self_attn.q_proj" in outcome.out
    llama().save_pretrained(tmp_path / "base")
    outcome = run("check", folder, "--for", "vllm", "--base", tmp_path / "base")
    assert (outcome.code, "as it is meant" in outcome.out) == (0, True)
    outcome = run("check", folder, "--for", "llama", "--json")
    assert (outcome.json["error"]["code"], outcome.code) == ("PSG904", 2)
    outcome = run("check", tmp_path / "nothing", "--for", "vllm", "--json")
    assert outcome.json["error"]["code"] == "PSG501"
