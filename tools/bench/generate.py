"""Generation beside the original's, in one process: SmolLM2, four prompts of unequal lengths.

Both decode the same tokens, each with a cache of its own, and take turns at every step, so whatever
else the machine does strikes both; medians are compared. What both generate must be equal.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import peftsurgery as ps
from peftsurgery.capture.generating import cache_argument
from tools.story.smollm2 import cached_model, what_is_missing

TOKENS, WARM_UP = 64, 3
WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 3}}
PROMPTS = (
    "What is the capital of France?",
    "Tell me a story about a small robot who had never seen the sea, and",
    "Count: one, two,",
    "The quick brown fox jumps over the lazy dog because it",
)


def decoding() -> dict[str, Any]:
    """Milliseconds of a decoding step, and which ways of generating gave other tokens.

    Or what is ``missing`` for it.
    """
    if missing := what_is_missing():
        return {"missing": missing}
    torch.set_num_threads(1)
    folder = cached_model()
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    captured = ps.capture(original, cache=True)
    inputs = _prompts(AutoTokenizer.from_pretrained(folder, padding_side="left"))
    wrong = [way for way in WAYS if not _equal(original, captured, inputs, way)]
    return {**_steps(original, captured, inputs), "wrong": wrong}


def _prompts(tokenizer: Any) -> dict[str, Tensor]:
    tokens = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def _equal(original: Any, captured: Any, inputs: dict[str, Tensor], way: str) -> bool:
    settings = {"max_new_tokens": TOKENS, "do_sample": False, **WAYS[way]}
    expected, made = (model.generate(**inputs, **settings) for model in (original, captured))
    return torch.equal(made, expected)


@torch.no_grad()
def _steps(original: Any, captured: Any, inputs: dict[str, Tensor]) -> dict[str, float]:
    models = {"ours": captured, "theirs": original}
    past = cache_argument(original)
    caches = {name: DynamicCache(config=original.config) for name in models}
    times: dict[str, list[float]] = {name: [] for name in models}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in range(WARM_UP + TOKENS):
        flags: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1, "return_dict": True}
        call = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **flags}
        for name, model in models.items():
            start = time.perf_counter()
            logits = model(**call, **{str(past): caches[name]}).logits
            times[name].append(1e3 * (time.perf_counter() - start))
        ids, positions = logits[:, -1:].argmax(-1), positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return {name: statistics.median(found[WARM_UP:]) for name, found in times.items()}
