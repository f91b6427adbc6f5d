"""The memory of a fold: how much more a process has at its peak than before, in MiB.

The folded model itself is in it. What a fold may need beside it, 1.2 times the largest weight in
fp32, is the limit that the project sets itself.
"""

from __future__ import annotations

import re
from pathlib import Path

WIDTH, LAYERS, MIB = 4096, 8, 2**20
LIMIT = 1.2


def memory() -> dict[str, float]:
    """Fold LoRA into a stack of equal linears in bf16 in this process: 256 MiB, all changed.

    ``peak``, ``result`` and ``largest``, the largest weight in fp32, in MiB. Linux alone tells.
    """
    import torch
    from torch import nn

    import peftsurgery as ps

    torch.set_num_threads(1)
    layers = (nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16) for _ in range(LAYERS))
    model = nn.Sequential(*layers)
    graph = ps.capture(model, inputs=(torch.randn(1, 3, WIDTH, dtype=torch.bfloat16),))
    operated = ps.apply(graph, "lora_all_linear")
    with torch.no_grad():
        for value in operated.learnt().values():
            value.add_(0.01)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = _status("VmRSS")
    folded = ps.fold(operated)
    result = sum(p.numel() * p.element_size() for p in folded.parameters())
    return {
        "peak": (_status("VmHWM") - before) / MIB,
        "result": result / MIB,
        "largest": 4 * WIDTH * WIDTH / MIB,
    }


def shown(found: dict[str, float]) -> str:
    """The measurement as a line of text."""
    return (
        f"fold of 256 MiB in bf16: {found['peak']:.0f} MiB more at the peak, of which "
        f"{found['result']:.0f} are the result; the largest weight in fp32 has "
        f"{found['largest']:.0f}"
    )


def broken(found: dict[str, float]) -> list[str]:
    """The limit, if it is broken."""
    beside = found["peak"] - found["result"]
    return (
        [f"a fold needs {beside:.0f} MiB of its own"] if beside > LIMIT * found["largest"] else []
    )


def _status(field: str) -> int:
    """A field of the process's status, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
