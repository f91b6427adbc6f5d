"""A measurement in a process of its own, so that its peak of memory is its own.

``python -m tools.bench.fresh MODULE FUNCTION ARGUMENT...`` calls a function of a module of this
directory with texts and prints what it returns as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def measured(
    module: str,
    function: str,
    *arguments: str,
    threads: int = 1,
    seconds: float | None = None,
    **settings: str,
) -> dict[str, Any]:
    """What ``function(*arguments)`` returns, run on so many threads in a fresh process.

    ``settings`` are variables of its environment. subprocess.SubprocessError if it fails or takes
    longer than ``seconds``.
    """
    command = [sys.executable, "-m", "tools.bench.fresh", module, function, *arguments]
    quiet = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    environment = {**os.environ, **quiet, "OMP_WAIT_POLICY": "passive", **settings}
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=seconds,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    home = importlib.import_module(f"tools.bench.{sys.argv[1]}")
    print(json.dumps(getattr(home, sys.argv[2])(*sys.argv[3:])))
