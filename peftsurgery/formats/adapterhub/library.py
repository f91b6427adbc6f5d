"""AdapterHub's configs and architectures, from the table ``library.yaml``.

A union of configs is one flat table here: the keys of its second member are ``1.r``, ``1.alpha``,
as the library itself counts, and so the rule files write them under ``checkpoint: adapterhub``.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.formats.words import words_of
from peftsurgery.language.schema import Rule

FORMAT, LIBRARY = "adapterhub", "AdapterHub"
BOTTLENECK, UNION, FUSED = "bottleneck", "union", "fusion"
MAX_UNION = 4  # parts are tried in every order

Flat = dict[str, Any]


@dataclass(frozen=True)
class ConfigKind:
    """What the library's configs of one architecture hold.

    ``kind`` is the kind of site they are about, ``defaults`` the values where they leave a key out,
    ``where`` the keys that say at which sites an adapter is, ``free`` those without effect; see
    ``library.yaml``.
    """

    kind: str
    defaults: Mapping[str, Any]
    where: Collection[str] = ()
    free: Collection[str] = ()
    taken: Collection[str] = ()
    inherited: Mapping[str, str] = field(default_factory=dict)


def _table() -> dict[str, Any]:
    return words_of(Path(__file__).with_name("library.yaml"))


def version() -> str:
    """The version that files are written for."""
    return str(_table()["version"])


@cache
def parts() -> dict[str, ConfigKind]:
    """The kinds of config that are understood, by architecture."""
    return {name: ConfigKind(**entry) for name, entry in _table()["configs"].items()}


def layouts() -> Mapping[str, Mapping[str, str]]:
    """What the parts of a layer are called, by the type of the model."""
    found: Mapping[str, Mapping[str, str]] = _table()["layouts"]
    return found


def sublayers() -> Mapping[str, Collection[str]]:
    """The words in the names of modules that tell a sublayer, by what it is."""
    found: Mapping[str, Collection[str]] = _table()["sublayers"]
    return found


def named(rule: Rule) -> dict[str, str]:
    """What follows the module in the names of a rule's parameters; nothing for a rule without.

    A / begins what belongs to the model, for all sites.
    """
    table = rule.table(FORMAT)
    if table is None:
        return rule.suffixes(FORMAT)
    known = _table()["tables"]
    if table not in known:
        where = f"the rule's `checkpoint: {FORMAT}` asks for the table '{table}'"
        raise SurgeryError("PSG512", where, did_you_mean(table, known))
    pool = f"/{_table()['pool']}"
    names = {name: text for name, text in known[table].items() if name in rule.params}
    return {n: f"{pool}.{text[1:]}" if text[0] == "/" else text for n, text in names.items()}


def architectures(flat: Mapping[str, Any]) -> dict[str, str]:
    """The architecture of each part of a flat config, by the prefix of its keys."""
    if flat.get("architecture") != UNION:
        return {"": str(flat.get("architecture") or BOTTLENECK)}
    prefixes = dict.fromkeys(key.split(".")[0] for key in flat if key != "architecture")
    return {f"{p}.": str(flat.get(f"{p}.architecture") or BOTTLENECK) for p in prefixes}


def flattened(config: Mapping[str, Any]) -> Iterator[Flat]:
    """A config as a flat table; a union once for every order of its parts."""
    if config.get("architecture") != UNION:
        yield dict(config)
        return
    for order in itertools.permutations(config["configs"]):
        members = {
            f"{i}.{key}": value for i, part in enumerate(order) for key, value in part.items()
        }
        yield {"architecture": UNION, **members}


def unflattened(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The config that a flat table stands for."""
    prefixes = architectures(flat)
    if "" in prefixes:
        return {key: value for key, value in flat.items() if (key, value) != ("architecture", None)}
    members = [{k.removeprefix(p): v for k, v in flat.items() if k.startswith(p)} for p in prefixes]
    return {"architecture": UNION, "configs": [unflattened(member) for member in members]}


def completed(flat: Mapping[str, Any], model_config: Any = None) -> Flat:
    """A flat config with every key that it leaves out at its default, or as the model has it."""
    full: Flat = {}
    for prefix, architecture in architectures(flat).items():
        part = parts().get(architecture)
        if part is None:
            continue
        for key, default in part.defaults.items():
            value = flat.get(f"{prefix}{key}", default)
            if value is None and key in part.inherited and model_config is not None:
                value = getattr(model_config, part.inherited[key], 0.0)
            full[f"{prefix}{key}"] = value
    return {**flat, **full}
