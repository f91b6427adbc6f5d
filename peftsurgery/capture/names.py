"""Dotted names of modules and tensors, as ``named_modules`` and state dicts have them."""

from __future__ import annotations


def join(path: str, name: str) -> str:
    """The dotted name of ``name`` beneath ``path``; either may be empty."""
    return f"{path}.{name}" if path and name else path or name
