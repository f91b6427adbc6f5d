"""What a difference costs: of two deep graphs, and of two checkpoints beside reading them.

``python -m tools.bench differences [GIGABYTES]`` captures two Llamas of 70B on meta, one of them
with another activation in a layer, and diffs them; then it writes checkpoints of so many gigabytes
each (2 unless given) in bf16, and compares their tensors: the same, changed everywhere, with a
folded LoRA, and cast. The time is put beside that of reading both files once: one after the other
from the first byte to the last, 1 MiB at a time, by one thread that does nothing else. Before a
warm turn both were read; before a cold one both are flushed and their pages dropped (fsync and
posix_fadvise DONTNEED), and it is an error if the system still has any of 64 places of each after
five seconds. Turns alternate, and medians of the wall clock count. Exit code 1 if a difference of
graphs takes 3 s of the processor or 1 GiB, or a cold comparison over 1.5 times the reading.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.bench.fresh import measured

LIMIT_SECONDS, LIMIT_GIB, LIMIT_READING = 3.0, 1.0, 1.5
TURNS = 3
ASKED = 50  # times that the system is told to drop a file's pages
WIDTH, HIDDEN, RANK = 2048, 5632, 16
LAYER_BYTES = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN)
CHANGES = {
    "same": "the same",
    "dense": "changed everywhere",
    "low": f"a folded LoRA of rank {RANK}",
    "cast": "cast to float16",
}


def deep_graphs() -> list[Any]:
    """Captures of two Llamas of 70B on meta, the second with another activation in layer 40."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import peftsurgery as ps

    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    config = LlamaConfig(**sizes, num_key_value_heads=8, num_hidden_layers=80, vocab_size=128256)
    sides = []
    for changed in (False, True):
        with torch.device("meta"):
            model = LlamaForCausalLM(config).eval()
        if changed:
            model.model.layers[40].mlp.act_fn = torch.nn.GELU()
        sides.append(ps.capture(model))
    return sides


def graphs() -> dict[str, float]:
    """Processor seconds of a difference of two 80-layer graphs, captured, and the peak in GiB."""
    import peftsurgery as ps

    sides = deep_graphs()
    started = time.process_time()
    found = ps.diff(sides[0], sides[1])
    seconds = time.process_time() - started
    lines = [str(line) for line in found.summary.lines]
    return {"seconds": seconds, "peak": _peak(), "lines": len(lines)}


def made(folder: str, gigabytes: str) -> None:
    """Write the checkpoints: ``first``, and what it was changed to."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    shapes = {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "o": (WIDTH, WIDTH)}
    shapes |= {"up": (HIDDEN, WIDTH), "gate": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN)}
    layers = max(round(float(gigabytes) * 1e9 / LAYER_BYTES), 1)
    first = {
        f"layers.{layer}.{name}.weight": (0.02 * torch.randn(shape)).bfloat16()
        for layer in range(layers)
        for name, shape in shapes.items()
    }
    ways: dict[str, Callable[[Any], Any]] = {
        "first": lambda w: w,
        "same": lambda w: w,
        "dense": lambda w: (w + 1e-3 * torch.randn(w.shape)).bfloat16(),
        "low": lambda w: (w + _low_rank(w.shape)).bfloat16(),
        "cast": lambda w: w.half(),
    }
    for name, way in ways.items():
        tensors = {key: way(weight) for key, weight in first.items()}
        save_file(tensors, Path(folder, f"{name}.safetensors"))


def _low_rank(shape: Any) -> Any:
    import torch

    return 5e-4 * torch.randn(shape[0], RANK) @ torch.randn(RANK, shape[1])


def compared(folder: str, change: str) -> dict[str, float]:
    """Seconds of reading both and of comparing them, warm and cold, and the peak in GiB."""
    from peftsurgery.diff.weights import compare_weights
    from peftsurgery.fingerprint import in_file

    paths = [Path(folder, f"{name}.safetensors") for name in ("first", change)]

    def compare() -> None:
        compare_weights(in_file(paths[0]), in_file(paths[1]), {})

    found: dict[str, float] = {}
    for state in ("warm", "cold"):
        times: dict[str, list[float]] = {"read": [], "compared": []}
        for _ in range(TURNS):
            for what, run in (("read", lambda: _read(paths)), ("compared", compare)):
                _read(paths) if state == "warm" else _forget(paths)
                started = time.perf_counter()
                run()
                times[what].append(time.perf_counter() - started)
        found |= {f"{state} {what}": statistics.median(each) for what, each in times.items()}
    return {**found, "peak": _peak()}


def _read(paths: list[Path]) -> None:
    room = bytearray(2**20)
    for path in paths:
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(room):
                pass


def _forget(paths: list[Path]) -> None:
    """Have the system drop the files' pages, asked again where other work still held some."""
    for path in paths:
        with path.open("rb") as stream:
            handle, size = stream.fileno(), path.stat().st_size
            os.fsync(handle)
            for _ in range(ASKED):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                if not any(_is_in_memory(handle, size * place // 64) for place in range(64)):
                    break
                time.sleep(0.1)
            else:
                raise RuntimeError("this system keeps pages that it was told to drop")


def _is_in_memory(handle: int, place: int) -> bool:
    """Whether a read at a place of a file would not have to wait for the disk."""
    try:
        return os.preadv(handle, [bytearray(1)], place, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False


def _peak() -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 2**20 if found else 0.0


def main(arguments: list[str]) -> int:
    """Measure, print, and say whether the limits hold."""
    console = Console(width=110)
    deep = measured("differences", "graphs")
    console.print(
        f"two graphs of 80 layers (Llama 70B, meta): {deep['seconds']:.2f} s, "
        f"{deep['peak']:.2f} GiB with the captures, {deep['lines']} changes"
    )
    threads = len(os.sched_getaffinity(0))
    with TemporaryDirectory() as folder:
        measured("differences", "made", folder, *(arguments[:1] or ["2"]), threads=threads)
        rows = {
            name: measured("differences", "compared", folder, name, threads=threads)
            for name in CHANGES
        }
    table = Table(title=f"weights of two checkpoints on {threads} threads, beside reading them")
    states = ("warm s", "reading s", "ratio", "cold s", "reading s", "ratio")
    for column in ("change", *states, "peak GiB"):
        table.add_column(column, justify="left" if column == "change" else "right")
    for name, row in rows.items():
        cells = [
            cell
            for state in ("warm", "cold")
            for cell in (row[f"{state} compared"], row[f"{state} read"], _ratio(row, state))
        ]
        table.add_row(CHANGES[name], *(f"{cell:.2f}" for cell in (*cells, row["peak"])))
    console.print(table)
    broken = list(_broken(deep, rows))
    for limit in broken:
        console.print(f"[red]{limit}[/red]")
    return 1 if broken else 0


def _ratio(row: dict[str, float], state: str) -> float:
    return row[f"{state} compared"] / row[f"{state} read"]


def _broken(deep: dict[str, float], rows: dict[str, dict[str, float]]) -> Iterator[str]:
    """Which limits are broken."""
    if deep["seconds"] > LIMIT_SECONDS or deep["peak"] > LIMIT_GIB:
        yield f"a difference of deep graphs takes over {LIMIT_SECONDS} s or {LIMIT_GIB} GiB"
    for name, row in rows.items():
        if _ratio(row, "cold") > LIMIT_READING:
            yield f"{CHANGES[name]}: over {LIMIT_READING} times the reading of both files"
