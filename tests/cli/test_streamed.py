"""``fold --stream``, ``verify`` and ``unfold``, as a user calls them."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import peftsurgery as ps
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
def test_options_of_a_streamed_fold_are_refused_without_it(
    tmp_path: Path, surgery: tuple[Path, Path], option: tuple[str, ...]
) -> None:
    error = said("fold", surgery[1], "-o", tmp_path / "out", *option, code=2)["error"]
    assert "--stream" in str(error)
    error = said("fold", surgery[1], "-o", tmp_path / "out", "--stream", "--verify", code=2)
    assert "--stream" in str(error)
    assert not (tmp_path / "out").exists()
