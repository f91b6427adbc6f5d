"""What it costs to start each command: processor seconds of a process, beside a bare Python's.

``python -m tools.bench.start`` runs the commands in turns and prints medians with their spread.
Exit code 1 if one that only lists or explains takes over 0.4 s. ``apply`` is of LoRA to MiniLM,
whose weights are not read; ``import torch`` is what no command that needs it can do without.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TURNS, LIMIT = 5, 0.4
LIGHT = {
    "--help": ("--help",),
    "explain": ("explain", "PSG101"),
    "rules ls": ("rules", "ls"),
    "rules words": ("rules", "words"),
    "rules show": ("rules", "show", "lora"),
    "rules schema": ("rules", "schema"),
}
CLI = ("-m", "peftsurgery")
ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Measure, print, and say whether the limit holds."""
    from rich.console import Console
    from rich.table import Table

    from tools.story.minilm import find_model

    with tempfile.TemporaryDirectory() as folder:
        programs = {
            "python": ("-c", "pass"),
            **{name: (*CLI, *words) for name, words in LIGHT.items()},
            "import torch": ("-c", "import torch"),
            "import transformers' models": ("-c", "import transformers.modeling_utils"),
            "apply": (*CLI, "apply", str(find_model()), "lora", "-o", f"{folder}/out", "--force"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(TURNS):
            for name, words in programs.items():
                seconds[name].append(spent(words))
    table = Table(title="start of a process: processor seconds, medians of turns")
    for column in ("what", "seconds", "from", "to", "over python"):
        table.add_column(column, justify="left" if column == "what" else "right")
    bare = statistics.median(seconds["python"])
    for name, values in seconds.items():
        middle = statistics.median(values)
        numbers = (middle, min(values), max(values))
        table.add_row(name, *(f"{number:.2f}" for number in numbers), f"{middle / bare:.0f}")
    Console().print(table)
    return int(any(statistics.median(seconds[name]) > LIMIT for name in LIGHT))


def spent(words: tuple[str, ...]) -> float:
    """The processor seconds of a Python with these arguments."""
    before = _children()
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *words]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env={**os.environ, **quiet})
    return _children() - before


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
