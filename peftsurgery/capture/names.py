"""Dotted names of modules and tensors, as ``named_modules`` and state dicts have them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile


def join(path: str, name: str) -> str:
    """The dotted name of ``name`` beneath ``path``; either may be empty."""
    return f"{path}.{name}" if path and name else path or name


def is_within(path: str, outer: str) -> bool:
    """Whether a path is another one, or lies beneath it."""
    return path == outer or path.startswith(f"{outer}.")


def common(paths: Sequence[str]) -> str:
    """The path of the innermost module that holds all of these, or is the only one."""
    parts = [path.split(".") for path in paths]
    alike = takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
    return ".".join(names[0] for names in alike)
