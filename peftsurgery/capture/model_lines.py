"""Which line of a model's own code an error came from."""

from __future__ import annotations

import linecache
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

TORCH = str(Path(torch.__file__).parent)
MOST = 160  # letters of a statement


def said_where(error: BaseException | None, module: nn.Module) -> str:
    """The innermost line of the model's code that an error passed, as a message ends with it.

    "" if the error passed none.
    """
    frames = [] if error is None else traceback.extract_tb(error.__traceback__)
    line = model_line(frames, module)
    return f" (at {line})" if line else ""


def model_line(frames: Sequence[traceback.FrameSummary], module: nn.Module) -> str:
    """The innermost of these lines that is in a file which the class of one of its modules is from.

    File, number and text, of a statement of several lines all of it; "" if there is none.
    """
    files = {_file(type(each)) for each in module.modules()}
    files = {name for name in files if name and not name.startswith(TORCH)}
    for frame in reversed(frames):
        if frame.filename in files and frame.lineno is not None:
            last = max(getattr(frame, "end_lineno", None) or 0, frame.lineno)
            lines = (linecache.getline(frame.filename, n) for n in range(frame.lineno, last + 1))
            text = _head(line.strip() for line in lines)
            return f"{Path(frame.filename).name}:{frame.lineno}: {text[:MOST]}"
    return ""


def _head(lines: Iterable[str]) -> str:
    """A statement in one line, without the statements within it."""
    told: list[str] = []
    for line in lines:
        told.append(line)
        if line.endswith(":"):
            break
    return " ".join(told)


def _file(kind: type) -> str | None:
    return getattr(sys.modules.get(kind.__module__), "__file__", None)
