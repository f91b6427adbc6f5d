"""Print two tables: what surgery costs by size of model, and how its models run beside others.

``python -m tools.bench`` measures everything; arguments are parts of the sizes' names, and
``--surgery`` leaves the second table out; ``methods`` prints another one, of every method trained
on MiniLM (see methods.py), ``differences`` what a diff costs (see differences.py), ``pages`` what
its page does (see pages.py), ``floor`` what LoRA adds to a step (see floor.py), ``calls`` what one
call costs (see calls.py), ``compiling`` how long it takes to compile (see compiling.py), ``files``
what a fold of files costs (see files.py), ``onnx`` what slots cost an ONNX model (see onnx.py).
Exit code 1 if a limit that the project sets itself is
broken: 1.5 GiB for the 70B Llama, 160 sites in it, the memory of a fold (see fold.py), 1.1 times
the original's time for a token, the same tokens.
"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.bench import calls, compiling, differences, files, floor, fold, methods, onnx, pages
from tools.bench.fresh import measured
from tools.bench.operate import SIZES

STEPS = ("build", "capture", "match", "rewrite", "fold")
LIMIT_GB, LARGEST, SITES = 1.5, "Llama 70B, meta", 160
LIMIT_TOKEN = 1.1
BESIDE = {
    "training": ("training step, LoRA on q and v", "peft"),
    "forward": ("forward in eval, 4 texts of 128 tokens", "the original"),
    "token": ("forward in eval, 1 token", "the original"),
    "decoding": ("decoding step of SmolLM2, 4 texts with a cache", "the original"),
}
HOME = {"decoding": "generate"}  # the module that measures it, if not `beside`


def main(arguments: list[str]) -> int:
    """Measure, print, and say whether the limits hold."""
    console = Console() if sys.stdout.isatty() else Console(width=132)  # in a file, nothing wraps
    wanted = [word for word in arguments if not word.startswith("--")]
    names = [name for name in SIZES if not wanted or any(word in name for word in wanted)]
    rows = []
    for name in names:
        with console.status(name):
            rows.append(measured("operate", "measure", name))
    console.print(surgery_table(rows))
    # so that glibc gives back what is freed, and the peak is that of the tensors
    folded = measured("fold", "memory", MALLOC_MMAP_THRESHOLD_="65536")
    console.print(fold.shown(folded))
    broken = broken_by_size(rows) + fold.broken(folded)
    if "--surgery" not in arguments:
        results = {name: measured(HOME.get(name, "beside"), name) for name in BESIDE}
        lacking = {name: results.pop(name) for name in BESIDE if "missing" in results[name]}
        for name, result in lacking.items():
            console.print(f"{BESIDE[name][0]}: left out, for want of {result['missing']}")
        console.print(beside_table(results))
        broken += broken_in_decoding(results["decoding"]) if "decoding" in results else []
    for limit in broken:
        console.print(f"[red]{limit}[/red]")
    return 1 if broken else 0


def broken_by_size(rows: list[dict[str, Any]]) -> list[str]:
    """Which limits of surgery are broken."""
    largest = next((row for row in rows if row["name"] == LARGEST), None)
    if largest and (largest["peak"] > LIMIT_GB or largest["sites"] != SITES):
        return [f"{LARGEST}: over {LIMIT_GB} GiB or not {SITES} sites"]
    return []


def broken_in_decoding(result: dict[str, Any]) -> list[str]:
    """Which limits of generation are broken."""
    broken = [f"other tokens than the original's: {way}" for way in result["wrong"]]
    if result["ours"] > LIMIT_TOKEN * result["theirs"]:
        broken.append(f"a token takes over {LIMIT_TOKEN} times what it takes the original")
    return broken


def surgery_table(rows: list[dict[str, Any]]) -> Table:
    """Seconds by step, and memory at the end of apply."""
    table = Table(
        title="lora_qv applied: processor seconds on one thread, each size in a fresh process"
    )
    columns = ("model", "sites", *STEPS, "match + rewrite", "all", "imports GiB", "peak GiB")
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        times = row["times"]
        cells = [f"{times[step]:.2f}" if step in times else "–" for step in STEPS]
        both, total = times["match"] + times["rewrite"], sum(times.values())
        table.add_row(
            row["name"],
            str(row["sites"]),
            *cells,
            f"{both:.2f}",
            f"{total:.1f}",
            f"{row['imported']:.2f}",
            f"{row['peak']:.2f}",
        )
    return table


def beside_table(results: dict[str, dict[str, float]]) -> Table:
    """Medians of runs that took turns, and their ratio."""
    table = Table(title="side by side: medians of runs that took turns, in ms")
    for column in ("what", "peftsurgery", "beside", "ratio"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, result in results.items():
        what, other = BESIDE[name]
        ours, theirs = result["ours"], result["theirs"]
        table.add_row(what, f"{ours:.1f}", f"{theirs:.1f} ({other})", f"{ours / theirs:.2f}")
    return table


if __name__ == "__main__":
    given = sys.argv[1:]
    others = {
        "calls": calls.main,
        "compiling": compiling.main,
        "methods": methods.main,
        "differences": differences.main,
        "pages": pages.main,
        "files": files.main,
        "floor": floor.main,
        "onnx": onnx.main,
    }
    if given and given[0] in others:
        sys.exit(others[given[0]](given[1:]))
    sys.exit(main(given))
