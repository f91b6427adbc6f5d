"""Side by side in one process: a training step with peft's, a forward with the original's.

The two take turns, so whatever else the machine does strikes both; medians are compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftsurgery as ps
from tools.bench.turns import median, taken

ROUNDS, BATCH, LENGTH = 15, 4, 128
CONFIG = {
    "vocab_size": 2000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def training() -> dict[str, float]:
    """Milliseconds of a step (forward, loss, backward, AdamW) with LoRA of rank 8 on q and v."""
    import peft

    base, batch = _base(), _batch()
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(copy.deepcopy(base), settings)
    ours = ps.apply(ps.capture(base), "lora_qv", rank=8, alpha=16)
    ours.capture_for(**batch)  # with labels: a capture of its own, made once
    return _medians(_step(ours, batch), _step(theirs, batch))


def forward() -> dict[str, float]:
    """Milliseconds of a forward in eval: the captured model and the one it was captured from."""
    base, batch = _base(), _batch()
    del batch["labels"]
    captured = ps.capture(base)
    captured.eval(), base.eval()
    return _medians(_forward(captured, batch), _forward(base, batch))


def token() -> dict[str, float]:
    """The same for one token of one text, where a model's own Python weighs most."""
    base = _base().eval()
    captured = ps.capture(base).eval()
    batch = {"input_ids": torch.ones(1, 1, dtype=torch.long)}
    return _medians(_forward(captured, batch), _forward(base, batch))


def _base() -> LlamaForCausalLM:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG, use_cache=False))


def _batch() -> dict[str, Tensor]:
    ids = torch.randint(2000, (BATCH, LENGTH))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Any]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _forward(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Any]:
    def run() -> None:
        with torch.no_grad():
            model(**batch)

    return run


def _medians(ours: Callable[[], Any], theirs: Callable[[], Any]) -> dict[str, float]:
    times = taken({"ours": ours, "theirs": theirs}, ROUNDS)
    return {name: median(times, name) for name in times}
