"""source_line: the line of a model's source that a node was captured from."""

from __future__ import annotations

import re

from torch import fx

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in \S+\n\s*(?P<text>.*)')
_PACKAGES = re.compile(r"^.*/(?:site|dist)-packages/")
# Frames that every module's call goes through, and say nothing of the model.
_ASIDE = ("torch/", "peftsurgery/")


def source_line(node: fx.Node) -> str:
    """``file:line: text`` of the innermost frame in the model's own code; "" if not known.

    A file of an installed package is named from the package on, any other by its last two names.
    """
    frames = [
        (_shortened(found["file"]), found["line"], found["text"].strip())
        for found in _FRAME.finditer(node.meta.get("stack_trace") or "")
    ]
    own = [frame for frame in frames if not frame[0].startswith(_ASIDE)]
    return "{}:{}: {}".format(*own[-1]) if own else ""


def _shortened(file: str) -> str:
    inside = _PACKAGES.sub("", file)
    return inside if inside != file else "/".join(file.split("/")[-2:])
