"""folded_module: a plain module that ``fold`` wrote, made again by its base's factory.

A module that is of no class of transformers has no config, so that its folded directory holds a
state dict and ``peftsurgery.json``, which says what made the base.
"""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn

from peftsurgery.capture.factories import Inputs, made_by
from peftsurgery.errors import SurgeryError, first_line
from peftsurgery.files import read_object
from peftsurgery.model_files import RECORD, SINGLE, read_model_files


def is_folded_module(path: str) -> bool:
    """Whether a directory holds a folded module that transformers has no class for."""
    there = (os.path.isfile(os.path.join(path, name)) for name in (RECORD, SINGLE))
    return all(there) and not os.path.isfile(os.path.join(path, "config.json"))


def folded_module(path: str) -> tuple[nn.Module, Inputs | None]:
    """The module with the weights there, and the example inputs of its base's factory.

    PSG205 if the record names no factory or that fails, PSG207 for weights that it has no place for
    or that are damaged.
    """
    factory = _factory(path)
    if factory is None:
        message = f"'{path}' holds a module's weights, and does not say what makes the module"
        raise SurgeryError("PSG205", message, "load them into the module, and capture that")
    module, inputs = made_by(factory)
    read_model_files(Path(path))
    try:
        load_model(module, os.path.join(path, SINGLE))
    except (RuntimeError, SafetensorError) as error:
        message = f"the weights in '{path}' are not those of '{factory}': {first_line(error)}"
        raise SurgeryError("PSG207", message) from None
    return module, inputs


def _factory(path: str) -> str | None:
    """What made the base, which may be a folded module itself."""
    seen: list[str] = []
    while is_folded_module(path) and path not in seen:
        seen.append(path)
        base = read_object(Path(path) / RECORD, "PSG205").get("base")
        path = base if isinstance(base, str) else ""
    return path if ":" in path and not os.path.exists(path) else None
