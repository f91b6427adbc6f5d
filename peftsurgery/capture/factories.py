"""made_by: the module that ``package.module:factory`` makes, and the inputs it came with.

A factory is called without arguments. It returns a module; or, for a module that is of no class of
transformers, so that no example inputs can be made for it, the two of them::

    def unet():
        return model, {"sample": torch.zeros(2, 4, 64, 64), "timestep": torch.zeros(2)}

Inputs are keyword arguments, a dict, or positional ones, a tuple.
"""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from peftsurgery.errors import SurgeryError, did_you_mean, first_line

Inputs = Mapping[str, Any] | tuple[Any, ...]

SHAPES = "a factory returns a module, or (module, inputs) with a tuple or a dict of inputs"
# What code of a user's raises if something in it is wrong.
MISTAKES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def made_by(spec: str) -> tuple[nn.Module, Inputs | None]:
    """The module that ``package.module:factory`` makes, and its example inputs or None.

    Raises PSG205 if there is no such factory, if it fails, or if it makes something else.
    """
    module_name, _, name = spec.partition(":")
    module = _imported(spec, module_name)
    made = _called(spec, module, _factory(spec, module, name))
    if isinstance(made, nn.Module):
        return made, None
    if not isinstance(made, tuple):
        raise SurgeryError("PSG205", f"'{spec}' made {_a(made)}, not an nn.Module", SHAPES)
    if len(made) != 2 or not isinstance(made[0], nn.Module):
        kinds = ", ".join(type(each).__name__ for each in made)
        raise SurgeryError("PSG205", f"'{spec}' made a tuple of ({kinds})", SHAPES)
    return made[0], _checked(spec, made[1])


def _imported(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        hint = None if error.name is None else _lies_here(error.name)
        raise SurgeryError("PSG205", f"'{spec}': {error}", hint) from None
    except MISTAKES as error:
        raise SurgeryError("PSG205", f"'{spec}': {first_line(error)}") from None


def _lies_here(name: str) -> str | None:
    """Hint for a module that was not found and is in the working directory."""
    if any(Path(f"{name}{end}").exists() for end in ("", ".py")):
        return "it is in this directory, which is not searched: set PYTHONPATH=."
    return None


def _factory(spec: str, module: ModuleType, name: str) -> Callable[[], Any]:
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise SurgeryError("PSG205", f"'{spec}': no '{name}' to call", did_you_mean(name, known))
    return factory


def _called(spec: str, module: ModuleType, factory: Callable[[], Any]) -> Any:
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise SurgeryError("PSG205", f"'{spec}' is called without arguments: {error}") from None
    except ValueError:
        pass  # written in C: it says no more of itself
    # seeded, so that a base of random weights is the same one whenever it is made again
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        try:
            return factory()
        except MISTAKES as error:
            where = _line_of(error, module)
            message = f"'{spec}' failed with {type(error).__name__}: {first_line(error)}"
            raise SurgeryError("PSG205", message, where=where) from error


def _line_of(error: Exception, module: ModuleType) -> str | None:
    """The place in a factory's own file that an error came from, deepest."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == module.__file__]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else None


def _checked(spec: str, inputs: object) -> Inputs:
    """The inputs that came with a module, if they are a dict by name or a tuple. PSG205."""
    if isinstance(inputs, tuple):
        return inputs
    if not isinstance(inputs, Mapping):
        hint = "one input is the tuple (x,)" if isinstance(inputs, torch.Tensor) else SHAPES
        raise SurgeryError("PSG205", f"'{spec}' made a module with {_a(inputs)} for inputs", hint)
    others = [key for key in inputs if not isinstance(key, str)]
    if others:
        message = f"'{spec}' made inputs with the name {others[0]!r}, which is no text"
        raise SurgeryError("PSG205", message, "name them as the module's forward does")
    return inputs


def _a(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
