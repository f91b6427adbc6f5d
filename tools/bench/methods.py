"""Every shipped method trained on MiniLM, beside full fine-tuning and peft's own: one table.

``tools/bench/run methods`` measures what has not been measured yet and prints all there is;
``--only NAME...`` measures these rows anew, ``--again`` everything; ``--steps N`` trains longer.
Each run has a process of its own, so its peak of memory is its own, and its result is kept in
build/bench/methods at once: what was interrupted goes on from there. Exit code 1 if a run failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from peftsurgery.language.shipped import shipped
from tools.bench.fresh import ROOT, measured
from tools.bench.recipes import CLOSE, ELSEWHERE, FULL, RECIPES
from tools.bench.task import STEPS

FOLDER = ROOT / "build" / "bench" / "methods"
SECONDS = 600.0  # far more than a run takes on an idle machine
POINTS = 0.02
SIDES = ("ours", "theirs")
Row = dict[str, Any]


def main(arguments: list[str]) -> int:
    """Measure what is asked for, then print the table and what it leaves open."""
    known = measurable()
    parser = argparse.ArgumentParser(prog="tools/bench/run methods", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=known, metavar="NAME")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="of training (default: %(default)s)"
    )
    parser.add_argument("--again", action="store_true", help="measure what was measured before too")
    options = parser.parse_args(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=150)
    runs = Runs(options.steps)
    for name in options.only or known:
        for side in SIDES if RECIPES[name].peft else SIDES[:1]:
            if options.only or options.again or not runs.file(name, side).is_file():
                with console.status(f"{name} ({'peft' if side == 'theirs' else 'here'})"):
                    runs.keep(name, side)
    rows = {name: {side: runs.read(name, side) for side in SIDES} for name in known}
    console.print(table(rows))
    for line in remarks(rows):
        console.print(line, markup=False)
    failed = any("error" in row for sides in rows.values() for row in sides.values() if row)
    return int(failed)


def measurable() -> list[str]:
    """The rows of the table: full fine-tuning, and each method whose rules are shipped."""
    there = {FULL, *shipped()}
    return [name for name, recipe in RECIPES.items() if there.issuperset(recipe.rules or (name,))]


class Runs:
    """The runs of so many steps: each is measured in a process of its own and kept in a file."""

    def __init__(self, steps: int) -> None:
        self.steps, self.folder = steps, FOLDER / str(steps)
        self.folder.mkdir(parents=True, exist_ok=True)

    def keep(self, name: str, side: str) -> None:
        """Measure one run and write its result, or what went wrong."""
        limit, steps = SECONDS * max(self.steps / STEPS, 1), str(self.steps)
        threads = os.cpu_count() or 1
        arguments = (side, name, str(FOLDER))
        try:
            row = measured(
                "training", *arguments, threads=threads, seconds=limit, BENCH_STEPS=steps
            )
        except subprocess.TimeoutExpired:
            row = {"error": f"not done in {limit:.0f} s"}
        except subprocess.CalledProcessError as error:
            row = {"error": f"failed with exit code {error.returncode}"}
        part = self.file(name, side).with_suffix(".part")
        part.write_text(json.dumps(row))
        part.replace(self.file(name, side))

    def file(self, name: str, side: str) -> Path:
        """Where the result of a run is kept."""
        return self.folder / f"{name.replace(' ', '_')}.{side}.json"

    def read(self, name: str, side: str) -> Row | None:
        """The result of a run; None if it was not made yet."""
        file = self.file(name, side)
        row: Row | None = json.loads(file.read_text()) if file.is_file() else None
        return row


def table(rows: dict[str, dict[str, Row | None]]) -> Table:
    """A row for each method: what it trains, what it reaches, what it costs, and peft's own."""
    shown = Table(title="MiniLM, docstrings to packages: every method trained for the same steps")
    shown.add_column("method")
    columns = ("trainable", "accuracy", "step ms", "peak GiB", "fold error")
    for column in (*columns, "peft: accuracy", "step ms", "peak GiB"):
        shown.add_column(column, justify="right")
    for name, sides in rows.items():
        ours, theirs = sides["ours"], sides["theirs"]
        beside = _cells(theirs)[1:] if theirs else ["–", "–", "–"]
        shown.add_row(name, *_cells(ours), _fold(ours), *beside)
    return shown


def _cells(row: Row | None) -> list[str]:
    """Trainable parameters, accuracy, milliseconds of a step, peak of memory."""
    if row is None or "error" in row:
        return ["failed" if row else "–", "–", "–", "–"]
    return [
        f"{row['trainable']:,}",
        f"{row['accuracy']:.1%}",
        f"{row['step_ms']:.0f}",
        f"{row['peak_gb']:.2f}",
    ]


def _fold(row: Row | None) -> str:
    found = (row or {}).get("fold", "–")
    return f"{found:.0e}" if isinstance(found, float) else str(found)


def remarks(rows: dict[str, dict[str, Row | None]]) -> list[str]:
    """What to read the numbers with: errors, codes, and methods far from full fine-tuning."""
    lines = [
        f"{name}: {recipe.beside}"
        for name, recipe in RECIPES.items()
        if recipe.beside and name in rows
    ]
    lines += [f"{name} has no row: {why}" for name, why in ELSEWHERE.items()]
    for name, sides in rows.items():
        for side, row in sides.items():
            if row and "error" in row:
                lines.append(f"{name} ({'peft' if side == 'theirs' else 'here'}): {row['error']}")
    lines.append("fold error PSG401: what the method computes is no change of weights")
    full = rows[FULL]["ours"]
    for name in CLOSE:
        row = rows.get(name, {}).get("ours")
        if not full or not row or "error" in full or "error" in row:
            continue
        gap = row["accuracy"] - full["accuracy"]
        verdict = "within two points"
        if gap < -POINTS:
            verdict = f"MORE THAN TWO POINTS: {_why(row, full)}"
        lines.append(f"{name}: {100 * gap:+.1f} points from full fine-tuning, {verdict}")
    return lines


def _why(row: Row, full: Row) -> str:
    """Whether a method lags behind in what it learnt or in what it makes of it."""
    losses = f"its training loss is {row['loss']:.2f}, full fine-tuning's {full['loss']:.2f}"
    if row["loss"] > full["loss"] + 0.02:
        return f"in these steps it has not learnt the texts as well; {losses}"
    return f"it has learnt the texts as well and carries less over; {losses}"
