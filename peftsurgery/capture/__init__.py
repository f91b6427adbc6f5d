"""Capture: a model in, a GraphModel out."""

from .model import Capture, GraphModel, capture
from .parts import Block
from .program import ModuleInfo, Program, TensorInfo
from .sources import Source, open_source

__all__ = [
    "Block",
    "Capture",
    "GraphModel",
    "ModuleInfo",
    "Program",
    "Source",
    "TensorInfo",
    "capture",
    "open_source",
]
