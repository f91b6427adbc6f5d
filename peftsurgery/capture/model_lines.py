"""Which line of a model's own code an error came from."""

from __future__ import annotations

import linecache
import sys
import traceback
from pathlib import Path

import torch
from torch import nn

TORCH = str(Path(torch.__file__).parent)


def said_where(error: BaseException | None, module: nn.Module) -> str:
    """The innermost line of the model's code that an error passed, as a message ends with it.

    It is in a file that the class of one of its modules is from; "" if the error passed none.
    """
    files = {_file(type(each)) for each in module.modules()}
    files = {name for name in files if name and not name.startswith(TORCH)}
    frames = [] if error is None else traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if frame.filename in files and frame.lineno is not None:
            text = linecache.getline(frame.filename, frame.lineno).strip()
            return f" (at {Path(frame.filename).name}:{frame.lineno}: {text[:120]})"
    return ""


def _file(kind: type) -> str | None:
    return getattr(sys.modules.get(kind.__module__), "__file__", None)
