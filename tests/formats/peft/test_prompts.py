"""Virtual tokens in peft's files: what is honoured, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import peftsurgery as ps
from peftsurgery.errors import SurgeryError
from tests.parity.models import captured

CONFIG = {
    "peft_type": "PROMPT_TUNING",
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": 4,
    "num_transformer_submodules": 1,
    "token_dim": 32,
}


def written(folder: Path, keys: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """An adapter's directory, with some of its config changed."""
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file(
        keys or {"prompt_embeddings": torch.ones(4, 32)}, folder / "adapter_model.safetensors"
    )
    return folder


def test_what_is_read_is_written_again_under_its_own_method(tmp_path: Path) -> None:
    for method in ("PROMPT_TUNING", "P_TUNING"):
        source = tmp_path / method
        source.mkdir()
        model = ps.from_peft(captured("llama"), written(source, peft_type=method))
        ps.to_peft(model, tmp_path / f"{method}_again")
        config = json.loads((tmp_path / f"{method}_again" / "adapter_config.json").read_text())
        assert {key: config[key] for key in CONFIG} == {**CONFIG, "peft_type": method}


@pytest.mark.parametrize(
    ("changes", "keys", "code", "word"),
    [
        ({"num_virtual_tokens": 5}, None, "PSG507", "prompt_embeddings"),
        ({"num_virtual_tokens": 4.0}, None, "PSG503", "num_virtual_tokens"),
        ({"num_transformer_submodules": 0}, None, "PSG503", "num_transformer_submodules"),
        ({"prompt_shift": 2}, None, "PSG504", "prompt_shift"),
        ({"peft_type": "CPT"}, None, "PSG502", "CPT"),
        ({}, {"prompt_embeddings": torch.ones(4, 31)}, "PSG507", "prompt_embeddings"),
        ({}, {"base_model.lm_head.weight": torch.ones(61, 32)}, "PSG506", "lm_head"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], keys: Any, code: str, word: str
) -> None:
    with pytest.raises(SurgeryError) as caught:
        ps.from_peft(captured("llama"), written(tmp_path, keys, **changes))
    assert (caught.value.code, word in caught.value.message) == (code, True), caught.value
