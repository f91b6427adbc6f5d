"""AdapterHub's golden files: tiny models, adapters on them, and what the library computed.

They are made by tools/golden.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file
from torch import Tensor

import peftsurgery as ps

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "adapterhub"
ARCHITECTURES = ("bert", "roberta", "gpt2", "llama")


@cache
def captured(architecture: str) -> ps.GraphModel:
    """The captured model; not to be changed."""
    config = transformers.AutoConfig.from_pretrained(GOLDEN / architecture)
    model: Any = getattr(transformers, config.architectures[0])(config).eval()
    missing, left = model.load_state_dict(
        load_file(GOLDEN / architecture / "model.safetensors"), strict=False
    )
    assert not left
    assert set(missing) <= {"lm_head.weight"}  # GPT-2's is its embedding
    model.tie_weights()
    model.config._name_or_path = ""
    return ps.capture(model, inputs=inputs(architecture))


@cache
def expected(architecture: str) -> dict[str, Tensor]:
    """Inputs, and logits by the name of the adapter."""
    return load_file(GOLDEN / architecture / "expected.safetensors")


def inputs(architecture: str) -> dict[str, Tensor]:
    """The batch that the logits are of."""
    found = expected(architecture)
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}
