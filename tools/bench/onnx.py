"""What slots for adapters cost an ONNX model in which no adapter is put: ``tools/bench/run onnx``.

A Llama of 2048 features and 2 layers is written twice, as it is and with a method's tensors as
inputs, and run by onnxruntime on one thread, in turns within one process. Shown are medians of the
ratios of processor time within one turn, with the middle half of them, without an adapter and with
one. Words are the methods to measure. Exit code 1 if a method that is left out costs more than the
project allows itself: 1.03 times the plain file.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import peftsurgery as ps
from tests.formats.onnx.sessions import AdaptedSession, opened
from tools.bench.turns import Times, median, ratio, shown, taken

METHODS = ("lora_qv", "lora_all_linear", "dora", "loha", "ia3", "pfeiffer", "prefix_tuning")
SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 32}
SHAPES = {(4, 128): 15, (1, 1): 60}
"""Batch and tokens, and how many turns."""
LIMIT = 1.03


def main(arguments: list[str]) -> int:
    """Print a row for each method and shape; returns the exit code."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=2000, **SIZES, **HEADS, use_cache=False)
    graph = ps.capture(LlamaForCausalLM(config).eval())
    table = Table(title="an ONNX model with slots beside the plain one, processor time")
    for column in ("method", "batch", "plain ms", "nothing put in", "an adapter put in"):
        table.add_column(column, justify="left" if column == "method" else "right")
    over = []
    with TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.onnx"
        ps.export_onnx(graph, plain)
        for method in arguments or METHODS:
            model = ps.apply(graph, method).eval()
            file, adapter = Path(folder) / "slots.onnx", Path(folder) / "a.onnx_adapter"
            ps.export_onnx(model, file, adapters="inputs")
            ps.export_adapter(model, adapter, "ort", force=True)
            for shape, turns in SHAPES.items():
                times = in_turns(plain, file, adapter, shape, turns)
                off = ratio(times, "off", "plain")
                words = "x".join(map(str, shape)), f"{median(times, 'plain'):.2f}"
                table.add_row(method, *words, shown(off), shown(ratio(times, "on", "beside")))
                over += [method] * (off[0] > LIMIT)
    Console(width=132).print(table)
    for method in dict.fromkeys(over):
        print(f"{method}: over {LIMIT} times the plain file with nothing put in")
    return int(bool(over))


def in_turns(plain: Path, file: Path, adapter: Path, shape: tuple[int, int], turns: int) -> Times:
    """Milliseconds of the plain file's runs, and of another's without an adapter and with one."""
    ids = np.random.default_rng(0).integers(0, 2000, shape)
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    first, second = opened(plain, threads=1), opened(file, threads=1)
    beside = AdaptedSession(second, adapter)

    def pair(run: Any) -> Mapping[str, Any]:
        # whatever ran last has its weights in the caches: the plain file runs before each
        return {"plain": lambda: first.run(None, given), "run": run}

    off = taken(pair(lambda: second.run(None, given)), turns, clock=time.process_time)
    on = taken(pair(lambda: beside.run(given)), turns, clock=time.process_time)
    return {"plain": off["plain"], "off": off["run"], "beside": on["plain"], "on": on["run"]}
