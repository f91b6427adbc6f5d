"""Adapters that peft keeps within another one's files: trained tokens beside a LoRA.

The other's config says at which modules, under a key of its own (``beside`` in ``library.yaml``),
and their tensors lie in a wrapper of the module. Apart from that they are adapters of their own
method, and are read and written as such.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from peftsurgery.errors import SurgeryError
from peftsurgery.formats.peft.config import AdapterConfig
from peftsurgery.formats.peft.library import Beside, peft_words
from peftsurgery.formats.peft.module_paths import ends
from peftsurgery.formats.peft.target_modules import tied
from peftsurgery.formats.peft.tensor_keys import Names, added_key
from peftsurgery.formats.words import brief


def split_beside(
    config: AdapterConfig, names: Names
) -> tuple[Names, list[tuple[AdapterConfig, Names]]]:
    """The names of an adapter's own tensors, and the adapters beside it, each at one module.

    PSG503 for a key that says nothing of modules, PSG508 for tensors that it does not mean.
    """
    added, found = dict(names.added), list[tuple[AdapterConfig, Names]]()
    for key, beside in peft_words().beside.items():
        for wrapper in [path for path in added if path.endswith(f".{beside.wrapper}")]:
            path, keys = wrapper.removesuffix(f".{beside.wrapper}"), added.pop(wrapper)
            value = next(
                (v for name, v in _said(config, key) if name is None or ends(path, name)), None
            )
            if value is None:
                tensor = next(iter(keys.values()))
                raise SurgeryError("PSG508", f"'{tensor}' is there, and {key} does not mean it")
            said = {"peft_type": beside.method, beside.carries: value, "target_modules": [path]}
            found.append((AdapterConfig(said), Names(added={path: keys})))
    return replace(names, added=added), found


def check_beside(config: AdapterConfig, beside: list[str], model: nn.Module) -> None:
    """Refuse a config that means other modules than those that have adapters beside it. PSG508.

    Of modules whose weights are one tensor, peft saves what is beside the first.
    """
    meant = [path for one in beside for path in {one, *tied(model, one)}]
    for key in peft_words().beside:
        for name, value in _said(config, key):
            if not any(name is None or ends(path, name) for path in meant):
                what = brief(value if name is None else name)
                message = f"{key} names {what}, and the adapter has no tensors for it"
                raise SurgeryError("PSG508", message, "the file is incomplete")


def _said(config: AdapterConfig, key: str) -> Iterator[tuple[str | None, Any]]:
    """What a config says under a key, by the names of modules; None for whichever has tensors."""
    value = config.values.get(key) or {}
    if not isinstance(value, list | dict):
        raise SurgeryError("PSG503", f"the adapter's {key} cannot be {brief(value)}")
    yield from value.items() if isinstance(value, dict) else [(None, value)]


def kept_beside(keys: Mapping[str, Any]) -> tuple[str, Beside] | None:
    """The key under which configs of other methods have adapters of a config's method, and how."""
    kind = keys.get("peft_type")
    return next(((k, one) for k, one in peft_words().beside.items() if one.method == kind), None)


def wrapped_key(beside: Beside, module: str, suffix: str) -> str:
    """The key of a tensor of an adapter that is beside another one."""
    return added_key(f"{module}.{beside.wrapper}", suffix)
