"""export: a saved surgery in the formats of other libraries."""

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnxruntime import AdapterFormat
from safetensors.torch import load_file, save_file

from tests.checkpoint.loras import llama, saved_lora


@pytest.fixture(scope="module")
def surgery(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import peftsurgery as ps

    path = tmp_path_factory.mktemp("surgeries") / "surgery"
    ps.apply(ps.capture(str(bert)), "lora_qv", rank=2, name="mine").save(path)
    return path


@pytest.mark.parametrize(
    ("to", "tensors", "key"),
    [
        (
            "peft",
            "adapter_model.safetensors",
            "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight",
        ),
        (
            "adapterhub",
            "adapter.safetensors",
            "encoder.layer.0.attention.self.query.loras.mine.lora_A",
        ),
    ],
)
def test_an_adapter_is_written_under_the_names_of_its_library(
    run: Any, surgery: Path, tmp_path: Path, to: str, tensors: str, key: str
) -> None:
    outcome = run("export", surgery, "--to", to, "-o", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.out
    assert set(outcome.json["files"]) == {"adapter_config.json", tensors}
    assert key in load_file(tmp_path / "out" / tensors)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert 2 in (config.get("r"), config.get("config", {}).get("r"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_adapter_for_onnxruntime_has_the_names_of_the_model(
    run: Any, surgery: Path, tmp_path: Path
) -> None:
    outcome = run("export", surgery, "--to", "ort-adapter", "-o", tmp_path / "a.onnx_adapter")
    assert outcome.code == 0, outcome.out
    read = AdapterFormat.read_adapter(str(tmp_path / "a.onnx_adapter")).get_parameters()
    known = load_file(surgery / "adapter.safetensors")
    assert {name.rpartition(".")[2] for name in read} == {"A", "B", "scale_slot"}
    assert len([name for name in read if name.endswith(".A")]) == len(known) // 2


@pytest.mark.slow
def test_an_onnx_file_is_checked_and_written(run: Any, surgery: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    outcome = run("export", surgery, "--to", "onnx", "-o", file, "--json")
    assert outcome.code == 0, outcome.out
    assert outcome.json["path"] == str(file)
    assert outcome.json["difference"] < 1e-5
    (said,) = (each for each in onnx.load(file).metadata_props if each.key == "peftsurgery.json")
    assert [entry["adapter"] for entry in json.loads(said.value)["folded"]] == ["mine"]


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code"),
    [
        (("--to", "keras"), "PSG901", 2),
        (("--to", "peft", "--cache"), "PSG901", 2),
        (("--to", "onnx", "--name", "nobody"), "PSG310", 3),
        (("--to", "peft", "--name", "nobody"), "PSG511", 3),
        (("--to", "adapterhub", "--name", "nobody"), "PSG511", 3),
    ],
)
def test_refusals_have_codes_and_leave_nothing(
    run: Any, surgery: Path, tmp_path: Path, arguments: tuple[str, ...], code: str, exit_code: int
) -> None:
    outcome = run("export", surgery, *arguments, "-o", tmp_path / "out", "--json")
    assert (outcome.json["error"]["code"], outcome.code) == (code, exit_code)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_surgery_and_what_is_there_already_are_refused(
    run: Any, bert: Path, surgery: Path, tmp_path: Path
) -> None:
    outcome = run("export", bert, "--to", "peft", "-o", tmp_path / "out", "--json")
    assert outcome.json["error"]["code"] == "PSG607"
    outcome = run("export", surgery, "--to", "peft", "-o", surgery, "--json")
    assert outcome.json["error"]["code"] == "PSG602"
    (tmp_path / "out").mkdir()
    outcome = run("export", surgery, "--to", "peft", "-o", tmp_path / "out", "--json")
    assert outcome.json["error"]["code"] == "PSG601"


@pytest.mark.parametrize("to", ["peft", "adapterhub"])
def test_an_export_from_another_base_is_refused_or_says_so(
    run: Any, bert: Path, surgery: Path, tmp_path: Path, to: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(bert, other)
    tensors = load_file(other / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    arguments = ("export", surgery, "--base", other, "--to", to, "-o", tmp_path / "out", "--json")
    assert run(*arguments).json["error"]["code"] == "PSG319"
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    outcome = run(*arguments, "--allow-other-base")
    assert "other values" in outcome.json["notes"][0]
    record = json.loads((tmp_path / "out" / "peftsurgery.json").read_text())
    assert "embeddings.LayerNorm.bias" in record["exported"][0]["other_base"]


def test_a_directory_of_pefts_is_exported_as_a_lora_of_less_rank(run: Any, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    folder = saved_lora(tmp_path / "dora", use_dora=True, lora_dropout=0.1)
    given = ("export", folder, "--base", tmp_path / "base", "--to", "gguf", "--json")
    outcome = run(*given, "-o", tmp_path / "out.gguf")
    assert outcome.json["error"]["code"] == "PSG520"
    outcome = run(*given, "-o", tmp_path / "out.gguf", "--as-lora", "2")
    assert outcome.code == 0, outcome.out
    assert outcome.json["schema"] == "peftsurgery.export/1"
    assert {each["rank"] for each in outcome.json["lora"].values()} == {2}
    assert "lacks" in outcome.json["notes"][-1]
    assert (tmp_path / "out.gguf").read_bytes()[:4] == b"GGUF"
    outcome = run(*given, "-o", tmp_path / "x", "--as-lora", "much")
    assert (outcome.json["error"]["code"], outcome.code) == ("PSG901", 2)
    outcome = run(*given, "-o", folder / "x.gguf", "--as-lora", "2")
    assert outcome.json["error"]["code"] == "PSG602"


def test_a_program_is_written_with_a_note_on_how_to_call_it(
    run: Any, surgery: Path, tmp_path: Path
) -> None:
    file = tmp_path / "model.pt2"
    outcome = run("export", surgery, "--to", "pt2", "-o", file, "--json")
    assert outcome.code == 0, outcome.out
    assert outcome.json["difference"] < 1e-5
    assert "input_ids [batch, sequence]" in outcome.json["notes"][0]
    assert "trust" in outcome.json["notes"][2]
    again = ("export", surgery, "--to", "pt2", "-o", file, "--json")
    assert run(*again).json["error"]["code"] == "PSG601"
    assert run(*again, "--force", "--adapters", "fold").code == 0
    assert run(*again, "--force", "--adapters", "inputs").json["error"]["code"] == "PSG901"


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "FILE"),
        ("diff", "FILE", "FILE"),
        ("fold", "FILE", "-o", "OUT"),
        ("export", "FILE", "--to", "pt2", "-o", "OUT"),
        ("apply", "FILE", "lora_qv", "-o", "OUT"),
    ],
)
def test_no_command_reads_a_program(run: Any, tmp_path: Path, command: tuple[str, ...]) -> None:
    file = tmp_path / "any.PT2"
    file.write_bytes(b"whatever: it is not opened")
    places = {"FILE": str(file), "OUT": str(tmp_path / "out")}
    outcome = run(*(places.get(word, word) for word in command), "--json")
    assert (outcome.json["error"]["code"], outcome.code) == ("PSG227", 3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["any.PT2"]
