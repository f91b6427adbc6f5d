"""Names in peft's files: `base_model.model.<module>.<suffix>`, and what they mean here.

The suffixes are those that the shipped rules list under ``checkpoint: peft``. What has none of them
is a parameter of the model itself: a bias that was trained, or a part of a module that was saved
whole. Where peft wrapped a module, the module's own tensors are under ``base_layer``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from ..errors import SurgeryError

PREFIX, WRAPPED = "base_model.model.", "base_layer"


@dataclass(frozen=True)
class Names:
    """The keys of an adapter's tensors: by module and suffix, and by the model's parameter."""

    added: dict[str, dict[str, str]] = field(default_factory=dict)
    own: dict[str, str] = field(default_factory=dict)


def sort_keys(keys: Iterable[str], suffixes: Collection[str]) -> Names:
    """Split the keys of a file. PSG504 for a wrapper in a wrapper, PSG506 without the prefix."""
    names = Names()
    longest_first = sorted(suffixes, key=len, reverse=True)
    for key in sorted(keys):
        if not key.startswith(PREFIX):
            message = f"the tensor '{key}' does not begin with '{PREFIX}'"
            raise SurgeryError("PSG506", message, "it was not saved by peft's save_pretrained")
        path = key.removeprefix(PREFIX)
        suffix = next((s for s in longest_first if path.endswith(f".{s}")), None)
        if suffix is None:
            names.own[unwrapped(path)] = key
        else:
            module = path.removesuffix(f".{suffix}")
            if module != unwrapped(module):
                raise _nested(key, unwrapped(module))
            names.added.setdefault(module, {})[suffix] = key
    return names


def _nested(key: str, module: str) -> SurgeryError:
    """The refusal of an adapter within another.

    peft makes them for torch.nn.MultiheadAttention. Its merge, which its forward goes through, adds
    the inner one's update twice (0.21.2), so the tensors alone do not say what was trained.
    """
    return SurgeryError(
        "PSG504",
        f"'{key}' is an adapter of '{module}' within an adapter of the module around it",
        "peft adds the inner update twice; merge with peft, and capture the merged model",
    )


def unwrapped(path: str) -> str:
    """A path without the names of peft's wrappers."""
    return ".".join(name for name in path.split(".") if name != WRAPPED)


def added_key(module: str, suffix: str) -> str:
    """The key of a tensor that a method added to a module."""
    return f"{PREFIX}{module}.{suffix}"


def own_key(parameter: str, wrapped: Collection[str]) -> str:
    """The key of one of the model's own parameters; ``wrapped`` are the modules with adapters."""
    module, _, leaf = parameter.rpartition(".")
    if module in wrapped:
        return f"{PREFIX}{module}.{WRAPPED}.{leaf}"
    return f"{PREFIX}{parameter}"
