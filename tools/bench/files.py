"""Folding a checkpoint: the streamed fold beside peft's merge and beside a copy of the files.

``python -m tools.bench.files [LAYERS]`` makes a Llama of that many layers (103 MB each in bf16, in
shards of 256 MB) and a LoRA of rank 16 for its q and v, and prints medians of three turns each, in
fresh processes: wall seconds, and the peak of the process's memory.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from tools.bench.fresh import measured

TURNS = 3
WAYS = ("copied", "streamed", "by_files", "merged")
NAMES = {
    "copied": "cp, with fsync",
    "streamed": "fold, plan and all",
    "by_files": "its part on files",
    "merged": "peft: load, merge, save",
}


def made(folder: str, layers: str) -> None:
    """Write ``base`` and ``adapter`` beneath a folder, with random weights."""
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16}
    config = LlamaConfig(**sizes, num_hidden_layers=int(layers), vocab_size=1024)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(Path(folder, "base"), max_shard_size="256MB")
    lora = peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(Path(folder, "adapter"))


def copied(folder: str) -> dict[str, float]:
    """Copy the base's files, and wait until they are on the disk."""

    def run(base: Path, out: Path) -> None:
        shutil.copytree(base, out)
        for path in out.iterdir():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())

    return _timed(folder, run)


def streamed(folder: str) -> dict[str, float]:
    """Fold as ``fold`` does: a plan by names, then the files; no torch is imported."""
    import peftsurgery as ps

    return _timed(folder, lambda base, out: ps.fold_checkpoint(_adapter(base), base, out))


def by_files(folder: str) -> dict[str, float]:
    """The part of a streamed fold that is done on files, without torch, for the same LoRA."""
    from safetensors.numpy import load_file

    from peftsurgery.checkpoint.plan import FoldPlan, Planned, SiteFold
    from peftsurgery.checkpoint.streaming import fold_files
    from peftsurgery.language.expression import parse
    from peftsurgery.tensor_file import read_header

    learnt = _adapter(Path(folder, "base")) / "adapter_model.safetensors"
    paths = {key.rpartition(".lora_")[0] for key in load_file(learnt)}
    sites = tuple(
        SiteFold(
            adapter="lora",
            module=path,
            weights={"W": f"{path.removeprefix('base_model.model.')}.weight"},
            parameters={name: f"{path}.lora_{name}.weight" for name in "AB"},
            numbers={"scale": 0.5},
            fold={"W": parse("W + scale * (B @ A)")},
            let={},
            rows={"B": 0},
        )
        for path in sorted(paths)
    )
    return _timed(
        folder,
        lambda base, out: fold_files(Planned(FoldPlan(sites), base, read_header(learnt)), out),
    )


def merged(folder: str) -> dict[str, float]:
    """Fold as peft does it: the model is loaded, merged and saved."""
    import peft
    from transformers import AutoModelForCausalLM

    def run(base: Path, out: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        whole = peft.PeftModel.from_pretrained(model, _adapter(base)).merge_and_unload()
        whole.save_pretrained(out, max_shard_size="256MB")

    return _timed(folder, run)


def _timed(folder: str, run: Callable[[Path, Path], object]) -> dict[str, float]:
    """Seconds that a run takes, and the peak of this process's memory in MiB."""
    base, out = Path(folder, "base"), Path(folder, "out")
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    started = time.perf_counter()
    run(base, out)
    seconds = time.perf_counter() - started
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return {"seconds": seconds, "peak": int(found[1]) / 1024}


def _adapter(base: Path) -> Path:
    return base.with_name("adapter")


def main(layers: str) -> None:
    """Measure all ways in turn, and print their medians."""
    with TemporaryDirectory() as folder:
        measured("files", "made", folder, layers)
        size = sum(path.stat().st_size for path in Path(folder, "base").iterdir()) / 2**20
        threads = len(os.sched_getaffinity(0))
        runs = [
            {way: measured("files", way, folder, threads=threads) for way in WAYS}
            for _ in range(TURNS)
        ]
    table = Table(title=f"a fold of {size:.0f} MiB in bf16: medians of {TURNS} turns")
    for column in ("what", "seconds", "to the copy", "peak MiB"):
        table.add_column(column, justify="left" if column == "what" else "right")
    copy = median(run["copied"]["seconds"] for run in runs)
    for way in WAYS:
        seconds, peak = (median(run[way][key] for run in runs) for key in ("seconds", "peak"))
        table.add_row(NAMES[way], f"{seconds:.2f}", f"{seconds / copy:.2f}", f"{peak:.0f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "8")
