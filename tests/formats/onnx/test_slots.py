"""Adapters as inputs: one ONNX file computes the base, and the model with any adapter put in."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftsurgery as ps
from peftsurgery import SurgeryError
from tests.formats.onnx.sessions import with_adapter
from tests.models.captured import captured
from tests.models.zoo import ZOO
from tests.surgery.reference import adapted, pairs_of, randomise


def run(file: Path, inputs: dict[str, Tensor], adapter: Path | None = None) -> Tensor:
    """The first output of an ONNX file, by a session of the test's own."""
    given = {name: value.numpy() for name, value in inputs.items()}
    return torch.from_numpy(with_adapter(file, adapter).run(given)[0])


def operated(name: str, rule: str, seed: int = 1, **settings: Any) -> Any:
    return randomise(ps.apply(captured(name), rule, **settings), seed).eval()


def test_adapters_of_any_rank_are_put_in_and_left_out(tmp_path: Path) -> None:
    one = operated("bert", "lora_qv", rank=4, alpha=8)
    other = operated("bert", "lora_qv", seed=2, rank=7, alpha=3, stabilised=True)
    result = ps.export_onnx(one, tmp_path / "m.onnx", adapters="inputs")
    for number, model in enumerate((one, other)):
        ps.export_adapter(model, tmp_path / f"{number}.onnx_adapter", "ort")
    inputs, original = ZOO["bert"].inputs(5, 13), ZOO["bert"].build()
    close: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
    with torch.no_grad():
        base = original(**inputs)[0]
    torch.testing.assert_close(run(tmp_path / "m.onnx", inputs), base, **close)
    for number, (model, scale) in enumerate(((one, 8 / 4), (other, 3 / 7**0.5))):
        found = run(tmp_path / "m.onnx", inputs, tmp_path / f"{number}.onnx_adapter")
        with torch.no_grad(), adapted(original, pairs_of(model, scale)) as module:
            wanted = module(**inputs)[0]
        torch.testing.assert_close(found, wanted, **close)
        assert (wanted - base).abs().max() > 1e-4
    assert set(result.slots) >= set(one.learnt())
    assert result.inputs["bert.encoder.layer.0.attention.self.query.lora_qv.A"][0] == "rank0"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        *product(["llama", "gpt2", "vit", "opt", "t5", "bart"], ["lora_qv", "dora", "pfeiffer"]),
        *product(["gpt2", "vit", "bart"], ["ia3", "bitfit"]),
        ("mixtral", "lora_qv"),
    ],
)
def test_methods_on_architectures(name: str, rule: str, tmp_path: Path) -> None:
    model = operated(name, rule)
    result = ps.export_onnx(model, tmp_path / "m.onnx", adapters="inputs")
    assert result.difference <= 1e-5
    ps.export_adapter(model, tmp_path / "a.onnx_adapter", "ort")
    inputs = ZOO[name].inputs(3, 9)
    with torch.no_grad():
        wanted = model(**inputs)[0]
        base = ZOO[name].build()(**inputs)[0]
    for want, adapter in ((base, None), (wanted, tmp_path / "a.onnx_adapter")):
        torch.testing.assert_close(
            run(tmp_path / "m.onnx", inputs, adapter), want, atol=1e-5, rtol=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["prefix_tuning", "prompt_tuning"])
def test_tokens_are_put_in_and_left_out(rule: str, tmp_path: Path) -> None:
    one = operated("bert", rule, length=3)
    other = operated("bert", rule, seed=2, length=5)
    ps.export_onnx(one, tmp_path / "m.onnx", adapters="inputs")
    ps.export_adapter(other, tmp_path / "a.onnx_adapter", "ort")
    inputs = ZOO["bert"].inputs(2, 6)
    with torch.no_grad():
        wanted = other(**inputs)[0]
        base = ZOO["bert"].build()(**inputs)[0]
    found = run(tmp_path / "m.onnx", inputs, tmp_path / "a.onnx_adapter")
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(run(tmp_path / "m.onnx", inputs), base, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_each_of_two_adapters_of_one_method_is_put_in_by_its_own_name(tmp_path: Path) -> None:
    both = randomise(ps.apply(captured("bert"), "lora_qv", rank=4, name="one"), 1)
    both = randomise(ps.apply(both, "lora_qv", rank=3, name="other"), 2).eval()
    ps.export_onnx(both, tmp_path / "m.onnx", adapters="inputs")
    inputs = ZOO["bert"].inputs(2, 6)
    for name in ("one", "other", None):
        adapter = tmp_path / f"{name}.onnx_adapter"
        ps.export_adapter(both, adapter, "ort", name=name)
        with torch.no_grad(), nullcontext() if name is None else both.only(name):
            wanted = both(**inputs)[0]
        found = run(tmp_path / "m.onnx", inputs, adapter)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_cannot_be_left_out_is_refused(tmp_path: Path) -> None:
    model = operated("bert", "prefix_tuning", length=3, shift=True)
    with pytest.raises(SurgeryError, match="PSG413"):
        ps.export_onnx(model, tmp_path / "m.onnx", adapters="inputs")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_adapters_has_none_to_put_in(tmp_path: Path) -> None:
    for model in (captured("functional"), ps.apply(captured("functional"), "lora_qv")):
        if model is not captured("functional"):
            model.deactivate()
        with pytest.raises(SurgeryError, match="PSG413"):
            ps.export_onnx(model, tmp_path / "m.onnx", adapters="inputs")
