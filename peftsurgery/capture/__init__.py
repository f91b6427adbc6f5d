"""Capture: a model in, a GraphModel out."""

from .captures import Capture, Captures
from .model import GraphModel, capture
from .parts import Block
from .program import ModuleInfo, Program, TensorInfo
from .sources import Source, open_source

__all__ = [
    "Block",
    "Capture",
    "Captures",
    "GraphModel",
    "ModuleInfo",
    "Program",
    "Source",
    "TensorInfo",
    "capture",
    "open_source",
]
