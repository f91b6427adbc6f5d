"""Time and memory of a capture on the meta device, each size in a fresh process.

python tools/bench/capture.py              every size
python tools/bench/capture.py llama-70b    one of them
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SIZES: Mapping[str, Mapping[str, Any]] = {
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
LIMIT_GB = 1.5


def measure(name: str) -> dict[str, Any]:
    """Capture one size in this process; peak memory counts everything, torch itself too."""
    import torch
    from transformers import LlamaConfig

    from peftsurgery.capture import capture
    from peftsurgery.capture.sources import build_on_meta

    torch.set_num_threads(1)
    imported = peak_gb()
    start = time.perf_counter()
    model = build_on_meta(LlamaConfig(**SIZES[name], dtype="bfloat16"))
    built = time.perf_counter()
    graph = capture(model)
    programs = [p for found in graph.captures[0].programs.values() for p in found]
    return {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in graph.parameters()),
        "build": built - start,
        "capture": time.perf_counter() - built,
        "imported": imported,
        "peak": peak_gb(),
        "blocks": len(programs) - 1,
        "classes": len({program.label for program in programs}) - 1,
    }


def peak_gb() -> float:
    """The most memory this process has held so far, in GiB.

    Not ``ru_maxrss``: a process has the peak of the one that started it there, from before it was
    a program of its own.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (peak,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(peak) / 2**20


def main(names: list[str]) -> int:
    """Print a table of the sizes; 1 if one needs more memory than it may."""
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "parameters", "build s", "capture s", "imports GB", "peak GB", "blocks")
    over = False
    for name in names or SIZES:
        command = [sys.executable, __file__, "--measure", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        over |= row["peak"] > LIMIT_GB
        table.add_row(
            name,
            f"{row['parameters'] / 1e9:.1f} B",
            f"{row['build']:.1f}",
            f"{row['capture']:.1f}",
            f"{row['imported']:.2f}",
            f"{row['peak']:.2f}",
            f"{row['blocks']} of {row['classes']} shape(s)",
        )
    Console().print(table)
    return int(over)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2])))
    else:
        sys.exit(main(sys.argv[1:]))
