"""ONNX with a cache: one file serves a text's first tokens and every later one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import peftsurgery as ps
from peftsurgery import SurgeryError
from tests.formats.onnx.sessions import with_adapter
from tests.models.captured import captured
from tests.models.zoo import ZOO
from tests.surgery.reference import randomise

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def original() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def windowed(name: str) -> Any:
    """A model whose window, of four tokens, slides over a text."""
    torch.manual_seed(0)
    if name == "mistral":
        return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).eval()
    original: Any = ZOO[name].build().eval()
    original.config.use_cache = True
    return original


def generated(file: Path, ids: torch.Tensor, count: int, adapter: Path | None = None) -> list[int]:
    """Greedy tokens of one text, by onnxruntime alone."""
    runs = with_adapter(file, adapter)
    past = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in runs.session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    names = [value.name for value in runs.session.get_outputs()]
    new, seen, tokens = ids.numpy(), 0, []
    for _ in range(count):
        seen += new.shape[1]
        given = {"input_ids": new, "attention_mask": np.ones((1, seen), np.int64), **past}
        found = dict(zip(names, runs.run(given), strict=True))
        new = found["logits"][:, -1:].argmax(-1).astype(np.int64)
        tokens.append(int(new[0, 0]))
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
    return tokens


@pytest.mark.slow
def test_a_file_with_a_cache_generates_as_the_original_does(
    original: LlamaForCausalLM, tmp_path: Path
) -> None:
    model = randomise(ps.apply(ps.capture(original), "lora_qv", rank=2), scale=0.5).eval()
    ps.export_onnx(model, tmp_path / "inputs.onnx", adapters="inputs", cache=True)
    result = ps.export_onnx(model, tmp_path / "folded.onnx", cache=True)
    assert result.outputs[:3] == ("logits", "present.0.key", "present.0.value")
    ps.export_adapter(model, tmp_path / "a.onnx_adapter", "ort")
    ids = torch.tensor([[5, 9, 2, 7]])

    def wanted(plain: LlamaForCausalLM) -> list[int]:
        found = plain.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
        return found[0, 4:].tolist()

    base, adapted = wanted(original), wanted(ps.fold(model))
    assert base != adapted
    assert generated(tmp_path / "inputs.onnx", ids, 12) == base
    assert generated(tmp_path / "inputs.onnx", ids, 12, tmp_path / "a.onnx_adapter") == adapted
    assert generated(tmp_path / "folded.onnx", ids, 12) == adapted


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_a_sliding_window_is_generated_past_its_end(name: str, tmp_path: Path) -> None:
    original = windowed(name)
    model = randomise(ps.apply(ps.capture(original), "lora_qv", rank=2), scale=0.5).eval()
    ps.export_onnx(model, tmp_path / "m.onnx", adapters="inputs", cache=True)
    ps.export_adapter(model, tmp_path / "a.onnx_adapter", "ort")
    ids = torch.tensor([[5, 9, 2, 7, 3, 8]])
    for plain, adapter in ((original, None), (ps.fold(model), tmp_path / "a.onnx_adapter")):
        found = plain.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert generated(tmp_path / "m.onnx", ids, 12, adapter) == found[0, 6:].tolist()


@pytest.mark.slow
def test_what_lengthens_a_text_once_is_refused_with_a_cache(
    original: LlamaForCausalLM, tmp_path: Path
) -> None:
    model = ps.apply(ps.capture(original), "prompt_tuning", length=2)
    with pytest.raises(SurgeryError, match="PSG413"):
        ps.export_onnx(model, tmp_path / "m.onnx", adapters="inputs", cache=True)


def test_a_model_that_does_not_generate_has_no_cache(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="PSG212"):
        ps.export_onnx(captured("bert"), tmp_path / "m.onnx", cache=True)
    assert list(tmp_path.iterdir()) == []
