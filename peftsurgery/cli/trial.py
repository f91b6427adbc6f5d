"""A capture tried in a process of its own, for ``peftsurgery doctor``."""

from __future__ import annotations

import json
import time
from typing import Any

from peftsurgery.errors import SurgeryError, first_line


def main() -> None:
    """Print, as JSON, what :func:`trial` found."""
    print(json.dumps(trial()))


def trial() -> dict[str, Any]:
    """What is here to compute with, and the seconds of a tiny module's capture, or why not.

    ``threads`` and ``accelerator`` are torch's; ``compiled`` tells whether folds on files have what
    is written in C.
    """
    found: dict[str, Any] = {}
    start = time.perf_counter()
    try:
        import torch
        from torch import nn

        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["accelerator"] = torch.cuda.get_device_name()

        from peftsurgery.capture import capture
        from peftsurgery.checkpoint.rounding import is_compiled

        found["compiled"] = is_compiled()
        module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
        inputs = torch.ones(3, 4)
        model = capture(module, inputs=(inputs,))
        torch.testing.assert_close(model(inputs), module(inputs))
    except (ImportError, SurgeryError, AssertionError) as error:
        return {**found, "capture_error": first_line(error)}
    return {**found, "capture_seconds": round(time.perf_counter() - start, 2)}
