"""Scripts run by several processes, as torchrun runs them; what they find comes back as JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
LIMIT = 240.0  # seconds; they take 30, and wait for each other for ever if one of them is gone


def environment() -> dict[str, str]:
    """This process's environment, without what would make it one of others."""
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join(filter(None, (str(ROOT), own.get("PYTHONPATH"))))
    return {**own, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_to_end(command: Sequence[str], folder: Path) -> str:
    """What a command writes in ``folder``; with its children it is gone afterwards, whatever."""
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as running:
        try:
            written, _ = running.communicate(timeout=LIMIT)
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 0, written[-4000:]
    return written


def together(script: Path, folder: Path, count: int = 2) -> list[dict[str, Any]]:
    """What each process of a script left in ``folder``, in ``0.json`` and so on."""
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    run_to_end((*launch, f"--nproc-per-node={count}", str(script), str(folder)), folder)
    files = [folder / f"{rank}.json" for rank in range(count)]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]
