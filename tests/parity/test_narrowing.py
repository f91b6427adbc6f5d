"""Narrowed adapters in peft's own words, read by peft: it computes what was meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import peftsurgery as ps
from tests.parity.models import base, batch, captured, randomise

LAYERS = {"layers_to_transform": [1]}


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        (
            "llama",
            {"where": {"layers": "1.."}},
            {**LAYERS, "layers_pattern": ["layers"], "target_modules": ["q_proj", "v_proj"]},
        ),
        (
            "bert",
            {"where": {"layers": 1, "role": "attn.q"}},
            {**LAYERS, "layers_pattern": ["layer"], "target_modules": ["query"]},
        ),
        ("gpt2", {"where": {"layers": 1}}, {**LAYERS, "layers_pattern": ["h"]}),
        ("t5", {"where": {"layers": 1}}, {**LAYERS, "layers_pattern": ["block"]}),
        ("llama", {"where": {"role": "attn.v"}}, {"target_modules": ["v_proj"]}),
        (
            "llama",
            {"by": [{"where": {"role": "attn.q", "layers": 0}, "rank": 2, "alpha": 3}]},
            {
                "target_modules": ["q_proj", "v_proj"],
                "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 2},
                "alpha_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 3},
            },
        ),
        (
            "llama",
            {"where": {"any": [{"layers": 0, "role": "attn.q"}, {"layers": 1, "role": "attn.v"}]}},
            {
                "target_modules": [
                    "model.layers.0.self_attn.q_proj",
                    "model.layers.1.self_attn.v_proj",
                ]
            },
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_reads_a_narrowed_adapter_as_it_was_meant(
    name: str, given: dict[str, Any], said: dict[str, Any], tmp_path: Path
) -> None:
    ours = ps.apply(captured(name), "lora", **given).eval()
    randomise(ours, lambda parameter: ".lora." in parameter, scale=0.3)
    ps.to_peft(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    keys = (
        "target_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
    )
    assert {key: config[key] for key in keys if key in said} == said
    assert not {key for key in keys if config.get(key)} - said.keys() - {"target_modules"}
    theirs = PeftModel.from_pretrained(base(name), tmp_path).eval()
    again = ps.from_peft(captured(name), tmp_path).eval()
    with torch.no_grad():
        expected = theirs(**batch()).logits
        torch.testing.assert_close(ours(**batch()).logits, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(again(**batch()).logits, expected, rtol=0, atol=1e-6)
        assert not torch.allclose(captured(name)(**batch()).logits, expected, atol=1e-5)
