"""Folding a checkpoint: the command, beside peft's merge and beside a copy of the files.

``python -m tools.bench files [LAYERS]...`` makes Llamas of so many layers (103 MB each in bf16, in
shards of 256 MB) with a LoRA of rank 16 for q and v, and prints medians of turns that alternate:
wall seconds, processor seconds and the peak of the memory, each of a whole process. Exit code 1 if
a limit that the project sets itself is broken: wall seconds to the copy's and to peft's, memory;
and the seconds in which a fold into 70B, whose files take no room on the disk, says what it needs.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from math import prod
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.bench.fresh import ROOT, measured

TURNS = 5
COPY = 'cp -r "$0/base" "$0/out" && sync "$0"/out/*'
COMMAND = "from peftsurgery.cli import main; main()"
NAMES = {"copied": "cp -r, flushed", "folded": "peftsurgery fold", "merged": "peft: merge, save"}
TO_COPY, TO_PEFT, PEAK = 1.3, 0.5, 160
PLANNED_IN = 2.0  # seconds
WIDTH, INNER, KEYS, WORDS, DEPTH, RANK = 8192, 28672, 1024, 128256, 80, 16  # Llama 70B, a LoRA
MODULES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KEYS, WIDTH),
    "self_attn.v_proj": (KEYS, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}


def made(folder: str, layers: str) -> None:
    """Write ``base`` and ``adapter`` beneath a folder, with random weights."""
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16}
    config = LlamaConfig(**sizes, num_hidden_layers=int(layers), vocab_size=1024)
    model = LlamaForCausalLM(config)
    model.save_pretrained(Path(folder, "base"), max_shard_size="256MB")
    lora = peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(Path(folder, "adapter"))


def merged(folder: str) -> None:
    """Fold as peft does it: the model is loaded, merged and saved."""
    import peft
    from transformers import AutoModelForCausalLM

    base, adapter, out = (Path(folder, name) for name in ("base", "adapter", "out"))
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    whole = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    whole.save_pretrained(out, max_shard_size="256MB")


def run(folder: str, way: str) -> dict[str, float]:
    """What one process takes: wall seconds, processor seconds, MiB at its peak.

    Run in a fresh process itself: a new process begins with the peak of the one that starts it.
    """
    out = Path(folder, "out")
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    fold = ["fold", f"{folder}/adapter", "--base", f"{folder}/base", "-o", str(out)]
    commands = {
        "copied": ["sh", "-c", COPY, folder],
        "folded": [sys.executable, "-c", COMMAND, *fold],
        "merged": [sys.executable, "-m", "tools.bench.fresh", "files", "merged", folder],
    }
    quiet = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    streams = [(os.POSIX_SPAWN_OPEN, k, os.devnull, os.O_WRONLY, 0) for k in (1, 2)]
    command, started = commands[way], time.perf_counter()
    child = os.posix_spawnp(command[0], command, {**os.environ, **quiet}, file_actions=streams)
    _, status, used = os.wait4(child, 0)
    seconds = time.perf_counter() - started
    assert status == 0, way
    cpu = used.ru_utime + used.ru_stime
    return {"seconds": seconds, "cpu": cpu, "peak": used.ru_maxrss / 1024}


def shown(console: Console, layers: str, merge: bool) -> list[str]:
    """Measure all ways in turn and print their medians; the limits that are broken."""
    with TemporaryDirectory() as folder:
        measured("files", "made", folder, layers)
        size = sum(path.stat().st_size for path in Path(folder, "base").iterdir()) / 1e9
        threads = len(os.sched_getaffinity(0))
        ways = [way for way in NAMES if merge or way != "merged"]
        turns = [
            {way: measured("files", "run", folder, way, threads=threads) for way in ways}
            for _ in range(TURNS)
        ]
    table = Table(title=f"a fold of {size:.2f} GB in bf16: medians of {TURNS} turns")
    for column in ("what", "wall s", "processor s", "to the copy", "to peft", "peak MiB"):
        table.add_column(column, justify="left" if column == "what" else "right")
    found = {way: _medians(turns, way, ways) for way in ways}
    for way, row in found.items():
        texts = (f"{row['seconds']:.2f}", f"{row['cpu']:.2f}", f"{row['copied']:.2f}")
        beside = f"{row['merged']:.2f}" if merge else "–"
        table.add_row(NAMES[way], *texts, beside, f"{row['peak']:.0f}")
    console.print(table)
    ours = found["folded"]
    limits = {"copied": TO_COPY, "merged": TO_PEFT, "peak": PEAK}
    return [
        f"{size:.1f} GB: {ours[name]:.2f} of {name}, where {limit} is the limit"
        for name, limit in limits.items()
        if name in ours and ours[name] > limit
    ]


def sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write a safetensors file in bf16 whose zeros take no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)


def sparse_70b(folder: Path) -> None:
    """Write ``base`` and ``adapter`` as a Llama of 70B and a LoRA for its q and v have them."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    ends = {"model.embed_tokens": (WORDS, WIDTH), "lm_head": (WORDS, WIDTH), "model.norm": (WIDTH,)}
    norms = {"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)}
    shards = [ends] + [
        {f"model.layers.{layer}.{name}": shape for name, shape in {**MODULES, **norms}.items()}
        for layer in range(DEPTH)
    ]
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shapes = {f"{name}.weight": shape for name, shape in shard.items()}
        sparse(base / file, shapes)
        where |= dict.fromkeys(shapes, file)
    index = {"metadata": {}, "weight_map": where}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    halves: dict[str, tuple[int, ...]] = {}
    for layer in range(DEPTH):
        for name in ("self_attn.q_proj", "self_attn.v_proj"):
            rows, columns = MODULES[name]
            key = f"base_model.model.model.layers.{layer}.{name}.lora_"
            halves |= {f"{key}A.weight": (RANK, columns), f"{key}B.weight": (rows, RANK)}
    sparse(adapter / "adapter_model.safetensors", halves)
    said = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 32,
        "target_modules": ["q_proj", "v_proj"],
    }
    (adapter / "adapter_config.json").write_text(json.dumps(said))


def planned(console: Console) -> list[str]:
    """Ask what a fold into 70B takes, and print the median of the seconds; the limit, if broken."""
    seconds = []
    with TemporaryDirectory() as folder:
        sparse_70b(Path(folder))
        given = ["fold", f"{folder}/adapter", "--base", f"{folder}/base", "-o", f"{folder}/out"]
        for _ in range(TURNS):
            started = time.perf_counter()
            command = [sys.executable, "-c", COMMAND, *given, "--dry-run"]
            said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
            seconds.append(time.perf_counter() - started)
    found = median(seconds)
    console.print(f"a fold into 70B, --dry-run: {found:.2f} s", said.stdout, sep="\n")
    return [f"--dry-run took {found:.2f} s of {PLANNED_IN} s"] if found > PLANNED_IN else []


def _medians(turns: list[dict[str, Any]], way: str, ways: list[str]) -> dict[str, float]:
    """Medians of a way's measures, and of its seconds over each other way's of the same turn."""
    own = {name: median(turn[way][name] for turn in turns) for name in ("seconds", "cpu", "peak")}
    ratios = {w: median(t[way]["seconds"] / t[w]["seconds"] for t in turns) for w in ways}
    return {**own, **ratios}


def main(arguments: list[str]) -> int:
    """Measure each size; peft's merge is left out with ``--no-peft``."""
    console = Console() if sys.stdout.isatty() else Console(width=132)
    layers = [word for word in arguments if not word.startswith("--")] or ["5", "10", "20", "40"]
    broken = [
        each for count in layers for each in shown(console, count, "--no-peft" not in arguments)
    ]
    broken += planned(console)
    for limit in broken:
        console.print(f"[red]{limit}[/red]")
    return 1 if broken else 0
