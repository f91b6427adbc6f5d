"""Trained tokens beside a LoRA: what does not fit together is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peftsurgery as ps
from tests.parity.models import base, captured, randomise
from tests.parity.training import logits

KEY = "trainable_token_indices"
TENSOR = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
Config, Tensors = dict[str, Any], dict[str, torch.Tensor]
Edit = Callable[[Config, Tensors], object]

WRONG: dict[str, tuple[Edit, str]] = {
    "no key": (lambda config, _: config.pop(KEY), f"PSG508: .*delta' is there, and {KEY} does not"),
    "no list": (lambda config, _: config.update({KEY: "x"}), f"PSG503: .*{KEY} cannot be 'x'"),
    "no row": (
        lambda config, _: config.update({KEY: [1, 200]}),
        "PSG116: .*200 is the number of no",
    ),
    "a text": (
        lambda config, _: config.update({KEY: ["a", 1]}),
        "PSG116: .*'a' is the number of no",
    ),
    "twice": (lambda config, _: config.update({KEY: [3, 3]}), "PSG116: .*a row is named twice"),
    "three": (lambda config, _: config.update({KEY: [1, 2, 3]}), r"PSG507: .*need \[3, 32\]"),
    "nested": (lambda config, _: config.update({KEY: {"embed_tokens": {}}}), "PSG503: .*cannot be"),
    "other": (lambda config, _: config.update({KEY: {"embed": [5, 2]}}), "PSG508: .*is there, and"),
    "more": (
        lambda config, _: config.update({KEY: {"embed_tokens": [5, 2], "lm_head": [1]}}),
        "PSG508: .*names 'lm_head', and the adapter has no tensors",
    ),
    "no tensor": (lambda _, tensors: tensors.pop(TENSOR), r"PSG508: .*names \[5, 2\], and"),
    "narrow": (
        lambda _, tensors: tensors.update({TENSOR: torch.zeros(2, 7)}),
        r"PSG507: .*has shape \[2, 7\]",
    ),
    "a norm": (
        lambda _, tensors: tensors.update(
            {TENSOR.replace("embed_tokens", "norm"): tensors.pop(TENSOR)}
        ),
        "PSG116: .*put_rows",
    ),
    "nowhere": (
        lambda _, tensors: tensors.update({TENSOR.replace("embed", "emb"): tensors.pop(TENSOR)}),
        "PSG506: .*is not in the model",
    ),
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 2])
    model = get_peft_model(base("llama"), config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    randomise(model, lambda name: name in trained)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_together_is_refused(adapter: Path, wrong: str) -> None:
    edit, message = WRONG[wrong]
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(config, tensors)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ps.SurgeryError, match=message):
        ps.from_peft(captured("llama"), adapter)


def test_a_fold_of_files_writes_the_trained_rows(adapter: Path, tmp_path: Path) -> None:
    base("llama").save_pretrained(tmp_path / "base")
    ps.fold_checkpoint(adapter, tmp_path / "base", tmp_path / "out")
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    rows = load_file(adapter / "adapter_model.safetensors")[TENSOR]
    table = folded.get_input_embeddings().weight
    assert torch.equal(table[[5, 2]], rows)
    operated = ps.from_peft(captured("llama"), adapter)
    torch.testing.assert_close(logits(folded), logits(operated), rtol=0, atol=2e-6)


def test_programs_that_know_no_trained_tokens_get_no_adapter_with_them(
    adapter: Path, tmp_path: Path
) -> None:
    operated = ps.from_peft(captured("llama"), adapter)
    with pytest.raises(ps.SurgeryError, match=f"PSG520: .*{KEY}"):
        ps.export_adapter(operated, tmp_path / "out", "vllm")
    assert not (tmp_path / "out").exists()
