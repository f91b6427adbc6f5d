"""What LoRA adds to the frozen model's own step: here and in peft, in one process, in turns.

The floor is the original, frozen, with a backward pass down to its embeddings. Each turn gives a
ratio of processor time to the floor's in the same turn, of which the medians are shown. Memory is
what a step keeps for its backward pass beside the parameters, in MB. Linears are those of a Llama,
experts those of a Mixtral, which peft adapts as ``target_parameters``.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import peftsurgery as ps
from tools.bench.fresh import measured

ROUNDS, WARM_UP = 12, 2
WIDTHS = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8}
CONFIG = {"vocab_size": 2000, "num_attention_heads": 8, "num_key_value_heads": 8, **WIDTHS}
EXPERTS = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
ALL = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
SITES = {
    "lora_qv": {"target_modules": ["q_proj", "v_proj"]},
    "lora_all_linear": {"target_modules": ALL},
    "lora_experts": {
        "target_parameters": [f"mlp.experts.{name}_proj" for name in ("gate_up", "down")]
    },
}
CASES = [
    (rule, dtype, shape)
    for rule in SITES
    for dtype in ("float32", "bfloat16")
    for shape in ("4x128", "1x512")
]


def main(arguments: list[str]) -> int:
    """Measure the cases that have these words (all unless given), each in a process of its own."""
    table = Table(title="over the frozen model's own: a training step, a forward, what is kept")
    for column in ("rule, dtype, batch", "step", "peft's", "share", "forward", "peft's", "MB"):
        table.add_column(column)
    for case in (each for each in CASES if {*arguments} <= {*each}):
        row = measured("floor", "overhead", *case)
        share = (row["step"][0] - 1) / (row["step"][1] - 1)
        times = [f"{value:.3f}" for value in row["step"]]
        forward = [f"{value:.3f}" for value in row["forward"]]
        kept = " / ".join(f"{value:.1f}" for value in row["kept"])
        table.add_row(" ".join(case), *times, f"{share:.2f}", *forward, kept)
    Console(width=132).print(table)
    return 0


def overhead(rule: str, dtype: str, shape: str) -> dict[str, list[float]]:
    """Ratios to the floor (ours, peft's) of a step and of a forward, and MB kept for backward."""
    import peft

    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = _base(rule).to(getattr(torch, dtype))
    settings = peft.LoraConfig(r=8, lora_alpha=16, **SITES[rule])
    theirs = peft.get_peft_model(copy.deepcopy(base), settings)
    ours = ps.apply(ps.capture(base), rule, rank=8, alpha=16)
    base.requires_grad_(False).get_input_embeddings().weight.requires_grad_(True)
    ids = torch.randint(2000, tuple(map(int, shape.split("x"))))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    models = [base.train(), ours.train(), theirs.train()]
    return {
        "step": _ratios([_step(model, batch) for model in models]),
        "forward": _ratios([_forward(model, batch) for model in models]),
        "kept": [_kept(model, batch) for model in models[1:]],
    }


def _base(rule: str) -> Any:
    """The model that has what a rule adapts."""
    if "target_parameters" in SITES[rule]:
        return MixtralForCausalLM(MixtralConfig(**{**CONFIG, **EXPERTS}, use_cache=False))
    return LlamaForCausalLM(LlamaConfig(**CONFIG, use_cache=False))


def _step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Any]:
    def step() -> None:
        model(**batch).loss.backward()
        model.zero_grad()

    return step


def _forward(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Any]:
    def forward() -> None:
        with torch.no_grad():
            model(**batch)

    return forward


def _ratios(runs: list[Callable[[], Any]]) -> list[float]:
    """Medians over the turns of each run's time to the first one's, but for the first."""
    turns = []
    for number in range(ROUNDS + WARM_UP):
        times = []
        for run in runs:
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        if number >= WARM_UP:
            turns.append([value / times[0] for value in times[1:]])
    return [statistics.median(column) for column in zip(*turns, strict=True)]


def _kept(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """MB of what autograd keeps of a call, each memory once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss = model(**batch).loss
    del loss
    return sum(found.values()) / 1e6
