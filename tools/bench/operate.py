"""Capture, match, rewrite and fold: LoRA on the query and value projections, by size of model.

Matching is the anatomy's survey and the rule's selection, cold. Rewriting is the rest of
``apply``: shapes are checked, parameters added, graphs sewn, forwards generated. Models on the meta
device have no weights to fold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tools.bench.capture import SIZES as LLAMAS
from tools.bench.capture import peak_gb

MINILM = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
}


@dataclass(frozen=True)
class Size:
    """A model to measure: its transformers classes, its config, and whether it has weights."""

    model: str
    config: str
    settings: Mapping[str, Any]
    has_weights: bool = False


SIZES = {
    "BERT 23M (MiniLM's shape)": Size("BertModel", "BertConfig", MINILM, has_weights=True),
    "Llama 1B, meta": Size("LlamaForCausalLM", "LlamaConfig", LLAMAS["llama-1b"]),
    "Llama 70B, meta": Size("LlamaForCausalLM", "LlamaConfig", LLAMAS["llama-70b"]),
}


def measure(name: str) -> dict[str, Any]:
    """Operate on one size in this process: seconds by step, peak GiB, sites, parameters.

    Seconds are the processor's on one thread, which other work on the machine does not lengthen.
    """
    import torch
    import transformers

    import peftsurgery as ps
    from peftsurgery.surgery.plan.cut import Operation
    from peftsurgery.surgery.plan.select import select_cuts

    torch.set_num_threads(1)
    size, rules = SIZES[name], ps.load_rules("lora_qv")
    imported, times = peak_gb(), dict[str, float]()

    def timed(step: str, run: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = run()
        times[step] = time.process_time() - start
        return result

    config = getattr(transformers, size.config)(**size.settings, dtype="bfloat16")
    with torch.device("cpu" if size.has_weights else "meta"):
        model = timed("build", lambda: getattr(transformers, size.model)(config).eval())
    graph = timed("capture", lambda: ps.capture(model))
    operation = Operation(rules, rules.with_, "lora_qv")
    timed("match", lambda: select_cuts(graph.captures[0], operation))
    operated = timed("rewrite", lambda: ps.apply(graph, rules))
    peak = peak_gb()
    if size.has_weights:
        timed("fold", lambda: ps.fold(operated))
    return {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "times": times,
        "imported": imported,
        "peak": peak,
        "sites": len(operated.report.matches),
    }
