"""Which modules an adapter_config.json means, by their paths alone.

peft reads a list of names as endings of module paths and a text as a regular expression for the
whole path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable

from peftsurgery.errors import SurgeryError
from peftsurgery.formats.peft.config import AdapterConfig
from peftsurgery.language.paths import full_match

LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")
IN_LIST = re.compile(r"(?:.*?\.)?([^.]*)\.(\d+)\.")


def target_test(config: AdapterConfig) -> Callable[[str], bool]:
    """Whether a config means a module, by its path; as peft decides it."""
    wanted = config.values.get("target_modules")
    excluded = _name_test(config, "exclude_modules")
    saved = [full_match(rf"(.*\.)?{name}(\..*)?") for name in config.names("modules_to_save")]
    named = _name_test(config, "target_modules")
    in_layer = (lambda path: True) if isinstance(wanted, str) else _layer_test(config)

    def means(path: str) -> bool:
        if excluded(path) or any(holds(path) for holds in saved):
            return False
        exact = not isinstance(wanted, str) and path in (wanted or ())
        return exact or (named(path) and in_layer(path))

    return means


def _name_test(config: AdapterConfig, key: str) -> Callable[[str], bool]:
    value = config.values.get(key)
    if isinstance(value, str):
        return full_match(value)
    names = config.names(key)
    return lambda path: any(ends(path, name) for name in names)


def saved_whole(path: str, names: Iterable[str]) -> bool:
    """Whether a module is, or lies in, one that modules_to_save names by the end of its path."""
    parts = path.split(".")
    heads = (".".join(parts[: n + 1]) for n in range(len(parts)))
    return any(head.endswith(name) for head in heads for name in names)


def ends(path: str, name: str) -> bool:
    """Whether a path is a name or ends with it, at a dot."""
    return path == name or path.endswith(f".{name}")


def _layer_test(config: AdapterConfig) -> Callable[[str], bool]:
    """Whether a module is in one of the layers_to_transform, if the config names any."""
    layers = config.values.get("layers_to_transform")
    if layers is None or layers == []:
        return lambda path: True
    wanted = [layers] if isinstance(layers, int) else layers
    if not isinstance(wanted, list) or not all(isinstance(layer, int) for layer in wanted):
        raise SurgeryError("PSG503", "the adapter's layers_to_transform are no numbers")
    return lambda path: is_in_layers(path, wanted, config.names("layers_pattern"))


def is_in_layers(path: str, layers: Collection[int], lists: Collection[str]) -> bool:
    """Whether a module is in one of these layers of the lists of these names, or of any list."""
    patterns = [re.compile(rf"(?:^|.*?\.){re.escape(name)}\.(\d+)\.") for name in lists]
    found = (pattern.match(path) for pattern in patterns or [LAYER])
    first = next((match for match in found if match), None)
    return first is not None and int(first[1]) in layers


def is_listed(wanted: list[str] | str, module: str) -> bool:
    """Whether such a list means an adapted module: peft looks at endings, dot or no dot."""
    if isinstance(wanted, str):
        return full_match(wanted)(module)
    return any(module.endswith(name) for name in wanted)
