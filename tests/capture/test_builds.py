"""A base made otherwise than its files say: new rows are random, and nothing else notices."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peftsurgery.capture.builds import Build, resize


def test_new_rows_are_drawn_without_moving_any_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[Any] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reached.append)
    config = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=2))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    resize(model, Build(vocabulary=13, stored=11))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert reached == []  # devices that hold no parameter are seeded by torch.manual_seed too
    again = LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=2))
    again.load_state_dict(
        {k: v[:11] if "embed" in k or "head" in k else v for k, v in model.state_dict().items()}
    )
    resize(again, Build(vocabulary=13, stored=11))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
