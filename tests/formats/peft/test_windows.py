"""Prefixes on models whose attention sees windows: what differs from peft is said, both ways.

The oracle is peft in the same process, for texts that fit into a window with the prefix and for
texts that do not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

import peftsurgery as ps
from peftsurgery.cli.root import root
from tests.parity.models import randomise

pytestmark = pytest.mark.filterwarnings("ignore")

LENGTH = 3
SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
NEO: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 1,
    "num_heads": 2,
    "attention_types": [[["local"], 1]],
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
    "embed_dropout": 0.0,
    "resid_dropout": 0.0,
}


def made(case: str) -> tuple[PreTrainedModel, int | None]:
    """A model and the window that its attention has."""
    torch.manual_seed(0)
    if case == "compared":  # smaller than the captured example: the graph has the mask
        return MistralForCausalLM(
            MistralConfig(**SIZES, num_key_value_heads=1, sliding_window=6)
        ).eval(), 6
    if case == "declared":  # larger: only the cache knows
        return MistralForCausalLM(
            MistralConfig(**SIZES, num_key_value_heads=1, sliding_window=24)
        ).eval(), 24
    if case == "in a table":
        return GPTNeoForCausalLM(GPTNeoConfig(**NEO, window_size=9)).eval(), 9
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval(), None


@torch.no_grad()
def logits(model: Any, length: int) -> Tensor:
    tokens = torch.arange(2 * length).view(2, length) % 20
    result: Tensor = model(input_ids=tokens).logits
    return result


@pytest.mark.slow
@pytest.mark.parametrize("case", ["compared", "declared", "in a table", "none"])
def test_a_prefix_on_a_model_with_windows_says_that_pefts_slides_out_of_them(
    case: str, tmp_path: Path
) -> None:
    model, window = made(case)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    theirs = get_peft_model(model, config).eval()
    randomise(theirs, lambda name: "prompt_encoder" in name, 0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ps.from_peft(ps.capture(made(case)[0]), tmp_path / "theirs").eval()

    told = [note for note in ours.report.notes if "windows of" in note]
    assert ps.to_peft(ours, tmp_path / "ours") == tuple(told)
    fits, longer = ((window or 40) - LENGTH, 40)
    torch.testing.assert_close(logits(ours, fits), logits(theirs, fits), rtol=0, atol=2e-6)
    apart = (logits(ours, longer) - logits(theirs, longer)).abs().max()
    if window is None:
        assert not told
        assert apart < 2e-6
    else:
        assert f"windows of {window} tokens: in peft the prefix of {LENGTH}" in told[0]
        assert apart > 1e-3


def test_the_command_line_says_it_too(tmp_path: Path) -> None:
    model = made("compared")[0]
    model.save_pretrained(tmp_path / "base")
    ps.apply(ps.capture(str(tmp_path / "base")), "prefix_tuning", length=2, shift=True).save(
        tmp_path / "surgery"
    )
    arguments = ["export", str(tmp_path / "surgery"), "--to", "peft", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(root, arguments)
    assert result.exit_code == 0
    assert "note: attention sees windows of 6 tokens" in result.output
