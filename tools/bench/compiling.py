"""Compiled by torch.compile: seconds until a training step runs, and the step, here and in peft.

Twelve equal Llama layers with LoRA on all linears; peft's model is compiled whole, ours by
``compile()``. Each order of the two runs in a fresh process with empty caches, after inductor has
compiled something small (what it makes once for a machine counts for neither). Steps take turns.
Seconds are those that the process computes, tracing and lowering; beside them is how long is waited
in all, for a C++ compiler too: it makes kernels, of which equal layers need the same in both. Exit
code 1 if the first are over 0.3 of peft's, or a step over peft's.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.bench.fresh import measured
from tools.bench.turns import ratio, shown, taken

ROUNDS = 15
LIMIT_COMPILE, LIMIT_STEP = 0.3, 1.0
CONFIG = {
    "vocab_size": 2000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
SITES = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
ORDERS = ("ours", "peft")


def measure(first: str) -> dict[str, Any]:
    """Seconds of the first compiled step (computed, waited) by model, and times of later ones.

    ``first`` is compiled first.
    """
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import peftsurgery as ps

    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**CONFIG, use_cache=False))
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules=SITES)
    theirs = peft.get_peft_model(copy.deepcopy(base), settings).train()
    ours = ps.apply(ps.capture(base), "lora_all_linear", rank=8, alpha=16).train()
    ids = torch.randint(2000, (4, 128))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def step(model: Any) -> Callable[[], None]:
        def run() -> None:
            model(**batch).loss.backward()
            model.zero_grad()

        return run

    runs = {"ours": step(ours), "peft": step(theirs)}
    for run in runs.values():
        run()
    small = torch.compile(lambda x, w: torch.relu(x @ w).softmax(-1).sum())
    small(torch.ones(8, 8), torch.ones(8, 8, requires_grad=True)).backward()
    ours.compile()
    theirs.compile()
    seconds = {}
    for name in sorted(runs, key=lambda name: name != first):
        start, waited = time.process_time(), time.perf_counter()
        runs[name]()
        seconds[name] = (time.process_time() - start, time.perf_counter() - waited)
    return {"compile": seconds, "step": taken(runs, ROUNDS)}


def main(arguments: list[str]) -> int:
    """Measure each order, print, and say whether the limits hold."""
    table = Table(title="compiled by inductor: 12 layers of 256, LoRA on all linears, 4 x 128")
    for column in ("compiled first", "seconds", "peft's", "share", "waited", "step / peft's"):
        table.add_column(column)
    shares, steps = [], []
    for first in ORDERS:
        with tempfile.TemporaryDirectory() as folder:
            row = measured(
                "compiling",
                "measure",
                first,
                TORCHINDUCTOR_CACHE_DIR=folder,
                TORCHINDUCTOR_FX_GRAPH_CACHE="0",
            )
        (mine, waited), (others, longer) = (row["compile"][name] for name in ORDERS)
        shares.append(mine / others)
        step = ratio(row["step"], *ORDERS)
        steps.append(step[0])
        numbers = (f"{mine:.1f}", f"{others:.1f}", f"{shares[-1]:.2f}")
        table.add_row(first, *numbers, f"{waited:.0f} of {longer:.0f}", shown(step))
    Console(width=132).print(table)
    return int(max(shares) > LIMIT_COMPILE or max(steps) > LIMIT_STEP)
