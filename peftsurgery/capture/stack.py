"""Where in the module tree a node of an exported graph comes from."""

from __future__ import annotations

import linecache
import sys
from types import FrameType

from torch import fx


def stack_paths(node: fx.Node) -> list[tuple[str, str]]:
    """The modules whose forward made ``node``, outermost first: (call key, path in the model)."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(key, path) for key, (path, _) in stack.items() if not key.startswith("_empty")]


def called_lines() -> str:
    """The lines that are running in functions called ``forward``, outermost first, as a traceback.

    torch finds them by naming every function that runs, which takes as long as tracing a node.
    """
    lines = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward":
            file, line = frame.f_code.co_filename, frame.f_lineno
            text = linecache.getline(file, line).strip()
            lines.append(f'  File "{file}", line {line}, in forward\n    {text}\n')
        frame = frame.f_back
    return "".join(reversed(lines)).strip()


def inherit(node: fx.Node, source: fx.Node) -> None:
    """Give an inserted node the origin of the node it serves: splitting keeps them together."""
    for key in ("nn_module_stack", "stack_trace"):
        if key in source.meta:
            node.meta[key] = source.meta[key]
