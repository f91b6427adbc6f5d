"""A checkpoint and a LoRA for it, made with numpy alone, and the fold of them as a process runs it.

Run as a program: BASE ADAPTER OUT [PART]. It prints its peak memory, and what heavy it imported.
"""

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from peftsurgery.checkpoint.part_folder import FoldPart
from peftsurgery.checkpoint.plan import FoldPlan, Planned, SiteFold
from peftsurgery.checkpoint.streaming import fold_files
from peftsurgery.language.expression import parse
from peftsurgery.tensor_file import read_header

SCALE, RANK = 1.5, 4


def made_at(folder: Path, shards: int, rows: int, columns: int = 512) -> tuple[Path, Path]:
    """A base of so many shards, each with one weight that is adapted and one that is not."""
    draw = np.random.default_rng(0)
    base = folder / "base"
    base.mkdir(parents=True)
    where, learnt = {}, {}
    for number in range(shards):
        name = f"model-{number:05d}.safetensors"
        tensors = {
            f"layers.{number}.{kind}.weight": draw.standard_normal((rows, columns), np.float32)
            for kind in ("q", "up")
        }
        save_file(
            {key: value.astype(ml_dtypes.bfloat16) for key, value in tensors.items()},
            base / name,
            metadata={"format": "pt"},
        )
        where |= dict.fromkeys(tensors, name)
        learnt[f"{number}.A"] = draw.standard_normal((RANK, columns), np.float32) * 0.1
        learnt[f"{number}.B"] = draw.standard_normal((rows, RANK), np.float32) * 0.1
    index = {"metadata": {"total_size": 4 * shards * rows * columns}, "weight_map": where}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text("{}")
    save_file(learnt, folder / "adapter.safetensors")
    return base, folder / "adapter.safetensors"


def plan_of(shards: int) -> FoldPlan:
    """The plan of a LoRA at each adapted weight."""
    sites = (
        SiteFold(
            adapter="lora",
            module=f"layers.{number}.q",
            weights={"W": f"layers.{number}.q.weight"},
            parameters={"A": f"{number}.A", "B": f"{number}.B"},
            numbers={"scale": SCALE},
            fold={"W": parse("W + update")},
            let={"update": parse("scale * (B @ A)")},
            absent=("b",),
            rows={"B": 0},
        )
        for number in range(shards)
    )
    return FoldPlan(tuple(sites), record={"base": None})


def main() -> None:
    base, adapter, out = map(Path, sys.argv[1:4])
    plan = plan_of(len(list(base.glob("*.safetensors"))))
    print("begun", flush=True)
    part = FoldPart.parse(sys.argv[4]) if sys.argv[4:] else None
    planned = Planned(plan, base, read_header(adapter))
    fold_files(planned, out, resume=True, reversible=True, part=part)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM"))
    heavy = sorted({"torch", "transformers"} & sys.modules.keys())
    print(json.dumps({"peak": int(peak.split()[1]) * 1024, "imported": heavy}))


if __name__ == "__main__":
    main()
