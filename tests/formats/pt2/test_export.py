"""Programs of torch.export: what torch loads is the original with its adapters, at any size."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery import SurgeryError
from peftsurgery.formats.pt2 import export as exporting
from tests.formats.made import expected
from tests.models.captured import captured
from tests.models.stepping import Stacked
from tests.models.zoo import ZOO
from tests.surgery.reference import randomise

SHAPES = ((1, 4), (5, 13))

APART = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
inputs = torch.load(sys.argv[2], weights_only=True)
torch.save(dict(program(**inputs)), sys.argv[3])
assert not {"peftsurgery", "transformers"} & {*sys.modules}
"""


def operated(name: str, rule: str = "lora_qv") -> Any:
    return randomise(ps.apply(captured(name), rule), scale=0.05).eval()


def run(file: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of a program, loaded by the test itself."""
    with torch.no_grad():
        found: dict[str, Tensor] = torch.export.load(file).module()(**inputs)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("adapters", ["keep", "fold"])
def test_a_program_computes_the_original_with_its_adapters(
    adapters: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = operated("llama")
    modes = [part.training for part in model.modules()]
    result = ps.export_pt2(model, tmp_path / "model.pt2", adapters)
    assert capfd.readouterr() == ("", "")
    assert [part.training for part in model.modules()] == modes
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt2"]
    assert result.inputs["input_ids"] == ("batch", "sequence")
    assert (result.outputs, result.libraries) == (("logits",), ())
    program = torch.export.load(tmp_path / "model.pt2")
    learnt = [name for name in program.state_dict if ".lora_qv." in name]
    assert len(learnt) == (len(model.learnt()) if adapters == "keep" else 0)
    for shape in SHAPES:
        inputs = ZOO["llama"].inputs(*shape)
        wanted = expected(ZOO["llama"].build(), model, inputs)
        found = run(tmp_path / "model.pt2", inputs)["logits"]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_process_without_transformers_runs_it_and_adapters_at_rest_are_left_out(
    tmp_path: Path,
) -> None:
    model = randomise(ps.apply(operated("bert"), "ia3"), scale=0.05)
    model.choose("lora_qv")
    model.train()
    ps.export_pt2(model, tmp_path / "model.pt2")
    assert model.training
    assert not [n for n in torch.export.load(tmp_path / "model.pt2").state_dict if ".ia3." in n]
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        (name,) = (each for each in archive.namelist() if each.endswith("peftsurgery.json"))
        record = json.loads(archive.read(name))
    assert [entry["adapter"] for entry in record["exported"]] == ["lora_qv"]
    inputs = ZOO["bert"].inputs(3, 7)
    torch.save(inputs, tmp_path / "inputs")
    files = [str(tmp_path / name) for name in ("model.pt2", "inputs", "outputs")]
    subprocess.run([sys.executable, "-c", APART, *files], check=True, timeout=120)
    found = torch.load(tmp_path / "outputs", weights_only=True)
    with torch.no_grad():
        wanted = model.eval()(**inputs).logits
    torch.testing.assert_close(found["logits"], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_module_of_ones_own_and_a_prefix_are_written_too(tmp_path: Path) -> None:
    for name, rule in (("functional", "lora_qv"), ("bert", "prefix_tuning")):
        model = operated(name, rule)
        result = ps.export_pt2(model, tmp_path / name)
        assert result.path == str(tmp_path / name / "model.pt2")
        inputs = ZOO[name].inputs(3, 9)
        with torch.no_grad():
            wanted = model(**inputs)
        wanted = wanted if isinstance(wanted, Tensor) else wanted.logits
        found = run(Path(result.path), inputs)[result.outputs[0]]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_program_that_differs_is_refused_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = operated("functional"), tmp_path / "model.pt2"
    load = torch.export.load

    def other(path: Path) -> Any:
        program = load(path)
        next(iter(program.state_dict.values())).data.add_(1.0)
        return program

    def broken(path: Path) -> Any:
        raise RuntimeError("no program")

    for replaced in (other, broken):
        monkeypatch.setattr(exporting.torch.export, "load", replaced)
        with pytest.raises(SurgeryError, match="PSG423"):
            ps.export_pt2(model, file)
        assert list(tmp_path.iterdir()) == []
    file.write_text("mine")
    with pytest.raises(SurgeryError, match="PSG601"):
        ps.export_pt2(model, file)
    with pytest.raises(SurgeryError, match="PSG423"):
        ps.export_pt2(model, file, force=True)
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["mine"]


def test_what_torch_cannot_write_is_refused_by_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 4) + 1

    def fails(*_: Any, **__: Any) -> Any:
        raise ValueError("a reason\nand more")

    with pytest.raises(SurgeryError, match="PSG414"):
        ps.export_pt2(ps.capture(Fixed(), (torch.ones(2, 4),)), tmp_path / "model.pt2")
    for part in ("save", "export"):
        monkeypatch.setattr(exporting.torch.export, part, fails)
        with pytest.raises(SurgeryError, match="PSG422") as refused:
            ps.export_pt2(operated("functional"), tmp_path / "model.pt2")
        assert refused.value.message.endswith("a reason")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_in_a_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to itself, torch's writer ends the process there."""

    @contextmanager
    def full(*_: Any) -> Iterator[Path]:
        yield Path("/dev/full")

    monkeypatch.setattr(exporting, "one_file", full)
    with pytest.raises(SurgeryError, match=r"PSG603.*No space left"):
        ps.export_pt2(operated("functional"), tmp_path / "model.pt2")


@pytest.mark.slow
def test_a_model_that_was_captured_with_a_cache_returns_none(tmp_path: Path) -> None:
    model = ps.capture(ZOO["llama"].build(), cache=True)
    result = ps.export_pt2(model, tmp_path / "model.pt2")
    assert result.outputs == ("logits",)
    assert {*result.inputs.values()} == {("batch", "sequence")}


@pytest.mark.slow
def test_weights_in_four_bits_stay_so_and_the_library_is_named(tmp_path: Path) -> None:
    model = operated("llama", "qlora")
    result = ps.export_pt2(model, tmp_path / "model.pt2")
    assert result.libraries == ("bitsandbytes",)
    assert "bitsandbytes" in result.notes[-1]
    dtypes = {v.dtype for v in torch.export.load(tmp_path / "model.pt2").state_dict.values()}
    assert torch.uint8 in dtypes
    inputs = ZOO["llama"].inputs(3, 9)
    with torch.no_grad():
        wanted = model(**inputs).logits
    found = run(tmp_path / "model.pt2", inputs)["logits"]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_loop_has_the_steps_of_the_capture_and_the_file_says_so(tmp_path: Path) -> None:
    model = Stacked().eval()
    result = ps.export_pt2(ps.capture(model, {"x": torch.randn(2, 5, 4)}), tmp_path / "model.pt2")
    assert result.inputs == {"x": ("batch", 5, 4)}
    assert result.difference == 0
    x = torch.randn(3, 5, 4)
    assert torch.equal(run(tmp_path / "model.pt2", {"x": x})["output"], model(x))
