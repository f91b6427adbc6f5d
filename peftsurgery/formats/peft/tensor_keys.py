"""Names in peft's files: `base_model.model.<module>.<suffix>`, and what they mean here.

The suffixes are those that the shipped rules list under ``checkpoint: peft``. What has none of them
is a parameter of the model itself: a bias that was trained, or a part of a module that was saved
whole. Where peft wrapped a module, the module's own tensors are under ``base_layer``. Of a module
that is trained whole a file may have three copies: the trained one by the module's name, again
under ``modules_to_save``, and the base's under ``original_module``.

What belongs to no module (virtual tokens) is its suffix alone. peft wraps no modules for it, and
one part of the prefix is missing then: `base_model.<module>`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field

from peftsurgery.errors import SurgeryError

PREFIX, WRAPPED = "base_model.model.", "base_layer"
TRAINED, ORIGINAL = "modules_to_save", "original_module"
UNWRAPPED = "base_model."


@dataclass(frozen=True)
class Names:
    """The keys of an adapter's tensors: by module and suffix, and by the model's parameter.

    ``again`` are further keys of values that ``own`` has, ``frozen`` the base's own values beside
    them.
    """

    added: dict[str, dict[str, str]] = field(default_factory=dict)
    own: dict[str, str] = field(default_factory=dict)
    again: dict[str, str] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)


def sort_keys(keys: Collection[str], known: Collection[str], nested: bool = False) -> Names:
    """Split the keys of a file. PSG504 for a wrapper in a wrapper, PSG506 without the prefix.

    Names that are ``known`` follow a module's path; after a / they are those of no module. With
    ``nested``, wrappers of parameters lie in each other: they are told apart by their whole paths.
    """
    names = Names()
    copies = {TRAINED: names.again, ORIGINAL: names.frozen}
    whole = {name[1:] for name in known if name[0] == "/"}
    longest_first = sorted((name for name in known if name[0] != "/"), key=len, reverse=True)
    prefix = PREFIX if whole.isdisjoint(keys) else UNWRAPPED
    for key in sorted(keys):
        if key in whole:
            names.added.setdefault("", {})[key] = key
            continue
        if not key.startswith(prefix):
            message = f"the tensor '{key}' does not begin with '{prefix}'"
            raise SurgeryError("PSG506", message, "it was not saved by peft's save_pretrained")
        path = key.removeprefix(prefix)
        suffix = next((s for s in longest_first if path.endswith(f".{s}")), None)
        if suffix is None:
            parts = path.split(".")
            group = next((copies[word] for word in copies if word in parts), names.own)
            group[unwrapped(path)] = key
        else:
            module = path.removesuffix(f".{suffix}")
            outer = re.sub(rf"(\.{WRAPPED})+$", "", module) if nested else module
            if outer != unwrapped(module):
                raise _nested(key, unwrapped(module))
            names.added.setdefault(module, {})[suffix] = key
    for name, key in names.again.items():
        names.own.setdefault(name, key)
    return names


def _nested(key: str, module: str) -> SurgeryError:
    """The refusal of an adapter within another.

    peft makes them for torch.nn.MultiheadAttention. Its merge, which its forward goes through, adds
    the inner one's update twice (0.21.2), so the tensors alone do not say what was trained.
    """
    message = f"'{key}' is an adapter of '{module}' within an adapter of the module around it"
    hint = "peft adds the inner update twice; merge with peft, and capture the merged model"
    return SurgeryError("PSG504", message, hint)


def unwrapped(path: str) -> str:
    """A path without the names of peft's wrappers."""
    wrappers = {WRAPPED, TRAINED, ORIGINAL}
    return ".".join(name for name in path.split(".") if name not in wrappers)


def added_key(module: str, suffix: str) -> str:
    """The key of a tensor that a method added to a module."""
    return f"{PREFIX}{module}.{suffix}"


def own_key(parameter: str, wrapped: Collection[str]) -> str:
    """The key of one of the model's own parameters; ``wrapped`` are the modules with adapters."""
    module, _, leaf = parameter.rpartition(".")
    if module in wrapped:
        return f"{PREFIX}{module}.{WRAPPED}.{leaf}"
    return f"{PREFIX}{parameter}"


def without_wrapper(key: str) -> str:
    """The key that a parameter of the model has beside virtual tokens."""
    return UNWRAPPED + key.removeprefix(PREFIX)
