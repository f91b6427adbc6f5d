"""Capture: a model in, a GraphModel out."""

from peftsurgery.capture.captures import Capture, Captures
from peftsurgery.capture.model import GraphModel, capture
from peftsurgery.capture.modules import Block
from peftsurgery.capture.program import ModuleInfo, Program, TensorInfo
from peftsurgery.capture.sources import Source, open_source

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
