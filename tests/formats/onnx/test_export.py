"""ONNX: the folded model in onnxruntime is the original with its adapters, at any size."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel

import peftsurgery as ps
from peftsurgery import SurgeryError
from peftsurgery.formats.onnx import file as exporting
from tests.formats.made import expected, minilm, model_directory
from tests.models.captured import captured
from tests.models.zoo import ZOO
from tests.surgery.reference import randomise


def run(file: Path, inputs: dict[str, Tensor]) -> Tensor:
    """The first output of an ONNX file, by a session of the test's own."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    result = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(result[0])


def operated(name: str, rule: str = "lora_qv") -> Any:
    return randomise(ps.apply(captured(name), rule), scale=0.05).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "opt", "vit"])
def test_onnxruntime_computes_the_original_with_its_adapters(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = operated(name)
    result = ps.export_onnx(model, tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")
    assert result.difference <= 1e-5
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]
    for batch, length in ((1, 4), (5, 13)):
        inputs = ZOO[name].inputs(batch, length)
        wanted = expected(ZOO[name].build(), model, inputs)
        torch.testing.assert_close(
            run(tmp_path / "model.onnx", inputs), wanted, atol=1e-5, rtol=1e-5
        )


@pytest.mark.slow
def test_a_module_of_ones_own_is_exported_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = operated("functional")
    ps.export_onnx(model, tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")
    original: Any = ZOO["functional"].build()
    with torch.no_grad():
        for match in model.report.matches:  # query and value weights, each with B A added by hand
            A, B = (model.get_parameter(name) for name in match["added"])
            original.get_parameter(match["parameter"]).add_(2.0 * B @ A)
        for batch, length in ((1, 4), (5, 13)):
            inputs = ZOO["functional"].inputs(batch, length)
            found = run(tmp_path / "model.onnx", inputs)
            torch.testing.assert_close(found, original(**inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_fused_projection_is_exported_with_its_slices(tmp_path: Path) -> None:
    model = operated("gpt2", "lora_all_linear")
    ps.export_onnx(model, tmp_path / "model.onnx")
    inputs = ZOO["gpt2"].inputs(4, 11)
    with torch.no_grad():
        wanted = model(**inputs).logits
    torch.testing.assert_close(run(tmp_path / "model.onnx", inputs), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_minilm_is_exported_with_batch_and_sequence_by_name(tmp_path: Path) -> None:
    model = randomise(ps.apply(ps.capture(str(minilm())), "lora_qv"), scale=0.02)
    result = ps.export_onnx(model, tmp_path / "model.onnx")
    assert result.inputs == {
        "input_ids": ("batch", "sequence"),
        "attention_mask": ("batch", "sequence"),
    }
    inputs = dict(ZOO["bert"].inputs(2, 21))
    inputs["attention_mask"][1, 15:] = 0
    wanted = expected(AutoModel.from_pretrained(minilm()), model, inputs)
    torch.testing.assert_close(run(tmp_path / "model.onnx", inputs), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_bf16_model_is_written_in_fp32_with_the_rounded_weights(tmp_path: Path) -> None:
    model = model_directory("llama", tmp_path / "model", torch.bfloat16)
    model = randomise(ps.apply(ps.capture(str(model)), "lora_qv"), scale=0.05)
    result = ps.export_onnx(model, tmp_path / "model.onnx")
    assert result.dtype == "float32"
    inputs = ZOO["llama"].inputs(3, 6)
    wide: Any = ps.fold(model).float()
    with torch.no_grad():
        wanted = wide(**inputs).logits
    torch.testing.assert_close(run(tmp_path / "model.onnx", inputs), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", ["fold", "inputs"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_of_numbers_takes_them_in_fp32(
    dtype: torch.dtype, adapters: Literal["fold", "inputs"], tmp_path: Path
) -> None:
    original: Any = ZOO["functional"].build().eval().to(dtype)
    seen = {name: value.to(dtype) for name, value in ZOO["functional"].inputs(2, 7).items()}
    model = randomise(ps.apply(ps.capture(original, inputs=seen), "lora_qv"), scale=0.05).eval()
    assert ps.export_onnx(model, tmp_path / "model.onnx", adapters).dtype == "float32"
    inputs = ZOO["functional"].inputs(3, 6)
    wide: Any = ps.fold(model) if adapters == "fold" else original
    with torch.no_grad():
        wanted = copy.deepcopy(wide).float()(**inputs)
    torch.testing.assert_close(run(tmp_path / "model.onnx", inputs), wanted, atol=1e-5, rtol=1e-5)


def test_weights_that_protobuf_cannot_hold_lie_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "LARGEST_FILE", 1000)
    model = operated("functional")
    result = ps.export_onnx(model, tmp_path / "model.onnx")
    assert result.data == str(tmp_path / "model.onnx.data")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).rename(moved / name)
    inputs = ZOO["functional"].inputs(3, 6)
    with torch.no_grad():
        wanted = model(**inputs)
    torch.testing.assert_close(run(moved / "model.onnx", inputs), wanted, atol=1e-5, rtol=1e-5)


def test_a_file_that_disagrees_never_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = exporting._save

    def sabotage(graph: Any, file: Path) -> Any:
        data = save(graph, file)
        model = onnx.load(file)
        weight = max(model.graph.initializer, key=lambda each: len(each.raw_data))
        values = onnx.numpy_helper.to_array(weight)
        weight.CopyFrom(onnx.numpy_helper.from_array(values + np.float32(1e-2), weight.name))
        onnx.save(model, file)
        return data

    (tmp_path / "model.onnx").write_text("an older file")
    monkeypatch.setattr(exporting, "_save", sabotage)
    with pytest.raises(SurgeryError, match="PSG411") as refusal:
        ps.export_onnx(operated("functional"), tmp_path / "model.onnx")
    assert refusal.value.exit_code == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "an older file"


class Untranslatable(nn.Module):
    """Something that onnx has no operator for."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(self.inner(x))


def test_what_has_no_translation_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = ps.capture(Untranslatable(), inputs={"x": torch.randn(2, 4)})
    with pytest.raises(SurgeryError, match="PSG412") as refusal:
        ps.export_onnx(model, tmp_path / "model.onnx")
    assert "bessel_j0" in str(refusal.value)
    assert list(tmp_path.iterdir()) == []
