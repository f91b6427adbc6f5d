"""What a capture costs against the depth of a model: Llamas of 70B's width, without weights.

``python -m tools.bench.depth`` prints a row for each depth, each in a fresh process. Seconds are of
the processor, and ``all`` has the imports in it; ``again`` is the capture of a second signature,
with labels. Exit code 1 if 80 layers cost over 1.5 times what 4 do, over 6 s or over 1 GB, or their
second signature over 1.5 s.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tools.bench.capture import SIZES, peak_gb
from tools.bench.fresh import measured

DEPTHS = (2, 4, 8, 32, 80)
STEPS = ("imports", "capture", "apply", "again")
FEW, MANY, LIMIT, LIMIT_GB = 4, 80, 1.5, 1.0
LIMIT_ALL, LIMIT_AGAIN = 6.0, 1.5


def measure(depth: str) -> dict[str, Any]:
    """Processor seconds of each step, peak memory in GiB, and the number of distinct blocks."""
    import torch

    import peftsurgery as ps

    config = {
        **SIZES["llama-70b"],
        "num_hidden_layers": int(depth),
        "vocab_size": 128256,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
    }
    marks = [time.process_time()]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        capture, apply = ps.capture, ps.apply
        marks[0] = time.process_time()
        graph = capture(folder)
        marks.append(time.process_time())
        operated = apply(graph, "lora_qv")
        marks.append(time.process_time())
        peak = peak_gb()
        ids = torch.ones(2, 8, dtype=torch.long, device="meta")
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        graph.capture_for(**inputs)
        marks.append(time.process_time())
    programs = [p for found in graph.captures[0].programs.values() for p in found]
    return {
        "depth": int(depth),
        "times": dict(zip(STEPS, _differences(marks), strict=True)),
        "all": marks[2],
        "peak": peak,
        "distinct": len({program.label for program in programs}) - 1,
        "sites": len(operated.report.matches),
    }


def _differences(marks: list[float]) -> list[float]:
    return [now - before for before, now in zip([0.0, *marks], marks, strict=False)]


def main() -> int:
    """Measure, print, and say whether the limits hold."""
    from rich.console import Console
    from rich.table import Table

    rows = {depth: measured("depth", "measure", str(depth)) for depth in DEPTHS}
    table = Table(title="lora_qv on a Llama of 70B's width: processor seconds, one thread")
    for column in ("layers", "distinct", *STEPS, "all", f"over {FEW} layers", "peak GiB"):
        table.add_column(column, justify="right")
    for depth, row in rows.items():
        steps = [f"{row['times'][step]:.2f}" for step in STEPS]
        ratio = row["all"] / rows[FEW]["all"]
        numbers = (f"{row['all']:.2f}", f"{ratio:.2f}", f"{row['peak']:.2f}")
        table.add_row(str(depth), str(row["distinct"]), *steps, *numbers)
    Console().print(table)
    many = rows[MANY]
    return int(
        many["all"] > min(LIMIT_ALL, LIMIT * rows[FEW]["all"])
        or many["peak"] > LIMIT_GB
        or many["times"]["again"] > LIMIT_AGAIN
    )


if __name__ == "__main__":
    sys.exit(main())
