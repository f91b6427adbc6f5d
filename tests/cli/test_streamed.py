"""``fold --stream``, ``verify`` and ``unfold``, as a user calls them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import peftsurgery as ps
from peftsurgery.checkpoint import fold_site
from peftsurgery.cli.root import root


@pytest.fixture(scope="module")
def surgery(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small model's directory, and a saved surgery on it whose LoRA does something."""
    folder = tmp_path_factory.mktemp("streamed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, vocab_size=32)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    model = ps.apply(ps.capture(str(folder / "base")), "lora_qv", rank=2)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("lora_qv.B"):
                value.normal_()
    model.save(folder / "surgery")
    return folder / "base", folder / "surgery"


def said(*args: object, code: int = 0) -> dict[str, object]:
    """What a command prints as JSON."""
    result = CliRunner().invoke(root, [*map(str, args), "--json"])
    assert result.exit_code == code, result.output
    found: dict[str, object] = json.loads(result.stdout)
    return found


def test_a_fold_is_streamed_verified_and_unfolded(
    tmp_path: Path, surgery: tuple[Path, Path]
) -> None:
    base, saved = surgery
    report = said("fold", saved, "-o", tmp_path / "out", "--stream", "--reversible")
    assert report["tensors"] == len(load_file(base / "model.safetensors"))
    assert said("verify", tmp_path / "out")["changed"] == 2
    said("unfold", tmp_path / "out", "-o", tmp_path / "back")
    mine, wanted = (folder / "model.safetensors" for folder in (tmp_path / "back", base))
    assert mine.read_bytes() == wanted.read_bytes()
    weights = tmp_path / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    error = said("verify", tmp_path / "out", code=4)["error"]
    assert isinstance(error, dict)
    assert error["code"] == "PSG417"


def test_parts_of_a_fold_are_run_by_several_processes(
    tmp_path: Path, surgery: tuple[Path, Path]
) -> None:
    _, saved = surgery
    asked = ("fold", saved, "-o", tmp_path / "out")
    assert said(*asked, "--part", "2/2")["part"] == "2/2"
    error = said(*asked, "--finish", code=3)["error"]
    assert isinstance(error, dict)
    assert error["code"] == "PSG610"
    assert "are written: 1" in str(error["message"])
    assert said(*asked, "--part", "1/2")["part"] is None
    assert said("verify", tmp_path / "out")["changed"] == 2
    for wrong in (("--part", "3/2"), ("--part", "1/2", "--force"), ("--finish", "--name", "x")):
        assert CliRunner().invoke(root, [*map(str, asked), *wrong]).exit_code == 2


def test_a_dry_run_says_what_a_fold_takes_and_writes_nothing(
    tmp_path: Path, surgery: tuple[Path, Path]
) -> None:
    base, saved = surgery
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    found = said("fold", saved, "-o", tmp_path / "out", "--dry-run")
    size = sum(value.nbytes for value in load_file(base / "model.safetensors").values())
    assert found["changed"] == 2
    assert size < float(str(found["write"])) < size + 10_000
    assert not list(tmp_path.iterdir())
    assert before == {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    (tmp_path / "out").mkdir()
    error = said("fold", saved, "-o", tmp_path / "out", "--dry-run", code=3)["error"]
    assert "PSG601" in str(error)


@pytest.mark.parametrize("option", [("--dtype", "float32"), ("--resume",), ("--reversible",)])
def test_options_that_are_about_files_are_refused_beside_those_that_need_the_model(
    tmp_path: Path, surgery: tuple[Path, Path], option: tuple[str, ...]
) -> None:
    for other in (("--class", "LlamaModel"), ("--onnx", str(tmp_path / "model.onnx"))):
        error = said("fold", surgery[1], "-o", tmp_path / "out", *option, *other, code=2)["error"]
        assert option[0] in str(error)
        assert other[0] in str(error)
    assert not list(tmp_path.iterdir())


def test_a_fold_without_options_is_made_on_files_and_checked_against_the_model(
    tmp_path: Path, surgery: tuple[Path, Path]
) -> None:
    base, saved = surgery
    report = said("fold", saved, "-o", tmp_path / "out", "--verify")
    assert float(str(report["verified"])) < 1e-5
    assert said("verify", tmp_path / "out")["changed"] == 2
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    assert isinstance(report["changed"], list)
    assert {change["name"] for change in report["changed"]} == {
        name for name in before if not torch.equal(before[name], after[name])
    }
    # replaced only when all is done, and only if that is asked for
    assert "PSG601" in str(said("fold", saved, "-o", tmp_path / "out", code=3)["error"])
    said("fold", saved, "-o", tmp_path / "out", "--dtype", "float64", "--force")
    assert {v.dtype for v in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        torch.float64
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_writes_what_the_function_writes_and_nothing_beside_it(
    tmp_path: Path, surgery: tuple[Path, Path]
) -> None:
    base, saved = surgery

    def folded(adapter: Path, out: str) -> int:
        # in a process of its own, the command copies ahead, before it knows what is changed
        command = [sys.executable, "-m", "peftsurgery", "fold", adapter, "--base", base]
        return subprocess.run([*command, "-o", tmp_path / out], capture_output=True).returncode

    assert folded(saved, "out") == 0
    ps.fold_checkpoint(saved, base, tmp_path / "wanted")
    one, two = (
        {file.name: file.read_bytes() for file in (tmp_path / name).glob("model*")}
        for name in ("out", "wanted")
    )
    assert one == two
    assert folded(saved, "out") == 3
    (tmp_path / "adapter").mkdir()
    shutil.copy(saved / "adapter.safetensors", tmp_path / "adapter")
    assert folded(tmp_path / "adapter", "none") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out", "wanted"]


@pytest.mark.slow
def test_what_is_not_as_operated_is_removed(
    tmp_path: Path, surgery: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"checked": False}

    def rounded(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        wrong["checked"] = True
        return values * 1.01

    folded = fold_site.folded
    monkeypatch.setattr(
        fold_site,
        "folded",
        lambda *given: {name: rounded(value) for name, value in folded(*given).items()},
    )
    error = said("fold", surgery[1], "-o", tmp_path / "out", "--verify", code=4)["error"]
    assert "PSG410" in str(error)
    assert wrong["checked"]
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_changes_nothing_is_written_only_if_that_is_asked_for(
    tmp_path: Path, surgery: tuple[Path, Path]
) -> None:
    base = surgery[0]
    ps.apply(ps.capture(str(base)), "lora_qv", rank=2).save(tmp_path / "surgery")
    asked = ("fold", tmp_path / "surgery", "-o", tmp_path / "out")
    assert "PSG415" in str(said(*asked, code=3)["error"])
    assert [path.name for path in tmp_path.iterdir()] == ["surgery"]
    said(*asked, "--allow-unchanged")
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.slow
def test_what_files_cannot_do_is_done_in_memory_with_a_note(tmp_path: Path) -> None:
    # T5 scales its hidden states where its config says that head and embeddings are tied
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = T5Config(**sizes, vocab_size=32, tie_word_embeddings=True, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    model = ps.apply(ps.capture(str(tmp_path / "base")), "lora_embedding", rank=2)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("lora_embedding.A"):
                value.normal_()
    model.save(tmp_path / "surgery")
    asked = ("fold", tmp_path / "surgery", "-o", tmp_path / "out")
    assert "PSG416" in str(said(*asked, "--stream", code=3)["error"])
    report = said(*asked)
    assert report["untied"]
    assert "break a tie" in str(report["notes"])
