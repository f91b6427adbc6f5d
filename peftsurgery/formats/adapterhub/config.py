"""AdapterHub's adapter_config.json: the rule file and the settings that it stands for.

    {config, name, model_type, model_class, model_name, hidden_size, version}

``config`` is one configuration or a union of several. It is a rule file's if every key has the
value that the file's table gives it, or the library's default; keys that carry a setting, say where
the adapter is, or have no effect may have any value that makes sense. A key that is none of these
is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peftsurgery.errors import SurgeryError, did_you_mean, nearest
from peftsurgery.formats.adapterhub.layout import MATRICES
from peftsurgery.formats.adapterhub.library import (
    FORMAT,
    MAX_UNION,
    UNION,
    Flat,
    architectures,
    completed,
    flattened,
    parts,
)
from peftsurgery.formats.words import brief, fits_setting, forms
from peftsurgery.language.parameter_axes import sizes_said
from peftsurgery.language.rule_file import RuleFile

# Before this version the library scaled by alpha where it should have by alpha / r.
SCALED = (1, 1, 0)


@dataclass(frozen=True)
class ConfigReading:
    """A config as one rule file's: its settings, and by kind of site the keys that say where."""

    file: RuleFile
    settings: Mapping[str, Any]
    where: Mapping[str, Mapping[str, Any]]


class HubConfig:
    """The checked values of an adapter_config.json."""

    def __init__(self, values: Mapping[str, Any], model_config: Any) -> None:
        """Raises PSG502 for an unknown method, PSG503 for a bad value, PSG504 for a refused key.

        ``model_config`` has the values that the adapter's config leaves to the model's.
        """
        self.values = values
        self.name = self._text("name")
        self.model_type = self._text("model_type")
        self.flats = [completed(f, model_config) for f in flattened(self._config())]
        self._check_version()
        self._check_keys()

    def readings(self) -> list[ConfigReading]:
        """The rule files that the config can be; PSG504 if it comes near some but is none."""
        found = []
        for file in forms(FORMAT):
            flat = next((flat for flat in self._alike(file) if not strangers(flat, file)), None)
            if flat is not None:
                found.append(ConfigReading(file, _settings(flat, file), _where(flat)))
        return found or self._refuse()

    def asked(self, parts: Iterable[str]) -> list[str]:
        """Those of the linears' words for which a config has its flag set."""
        flat = self.flats[0]
        set_ = {key.rpartition(".")[2] for key, value in flat.items() if value is True}
        return [part for part in parts if f"{part}_lora" in set_]

    def _text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str) or not value:
            raise SurgeryError("PSG503", f"the adapter's {key} cannot be {value!r}")
        return value

    def _config(self) -> Mapping[str, Any]:
        config = self.values.get("config")
        if not isinstance(config, dict):
            message = f"the adapter's config is {brief(config)}, not an object with all its values"
            raise SurgeryError("PSG503", message, "save it again with adapters 1.1 or newer")
        members = config.get("configs") if config.get("architecture") == UNION else [config]
        if not isinstance(members, list) or not all(isinstance(part, dict) for part in members):
            raise SurgeryError("PSG503", "the adapter's union of configs is no list of objects")
        is_nested = any(part.get("architecture") == UNION for part in members)
        if is_nested or not 0 < len(members) <= MAX_UNION:
            message = "the adapter's union of configs is not one of a few configs"
            raise SurgeryError("PSG504", message)
        for part in members:
            known = parts()
            architecture = part.get("architecture")
            if architecture is not None and str(architecture) not in known:
                message = f"the adapter's architecture is {brief(architecture)}"
                raise SurgeryError("PSG502", message, did_you_mean(str(architecture), known))
        return config

    def _check_version(self) -> None:
        """Refuse what an old version of the library computed otherwise. PSG504."""
        version = self._text("version")
        found = re.match(r"adapters\.(\d+)\.(\d+)\.(\d+)", version)
        old = found is not None and tuple(map(int, found.groups())) < SCALED
        flat = self.flats[0]
        if old and any(flat.get(f"{p}r") != flat.get(f"{p}alpha") for p in architectures(flat)):
            message = f"the adapter was saved by {version}, which took no account of the rank"
            hint = f"save it again with adapters {'.'.join(map(str, SCALED))} or newer"
            raise SurgeryError("PSG504", message, hint)

    def _check_keys(self) -> None:
        """Refuse keys that the library does not have, unless they say nothing. PSG504."""
        flat = self.flats[0]
        for prefix, architecture in architectures(flat).items():
            known = parts()[architecture].defaults
            for key, value in flat.items():
                if not key.startswith(prefix) or value in (None, False, "", [], {}):
                    continue
                name = key.removeprefix(prefix)
                if "." not in name and name != "architecture" and name not in known:
                    message = f"the adapter's config has {name} = {brief(value)}"
                    hint = nearest(name, known) or f"the library's keys: {', '.join(known)}"
                    raise SurgeryError("PSG504", f"{message}, which is not honoured", hint)

    def _alike(self, file: RuleFile) -> list[Flat]:
        """The orders of the config in which it has the parts of a rule file's, in its order."""
        wanted = architectures(file.checkpoint[FORMAT])
        return [flat for flat in self.flats if architectures(flat) == wanted]

    def _refuse(self) -> list[ConfigReading]:
        near = [strangers(flat, file) for file in forms(FORMAT) for flat in self._alike(file)]
        if not near:
            names = ", ".join(architectures(self.flats[0]).values())
            raise SurgeryError("PSG502", f"no shipped rule is made of these configs: {names}")
        odd = min(near, key=len)
        flat = self.flats[0]
        listed = ", ".join(f"{key} = {brief(flat.get(key))}" for key in odd)
        raise SurgeryError("PSG504", f"no shipped rule is this method with {listed}")


def expected(file: RuleFile) -> Flat:
    """The config of a rule file, but for its settings and sites: the library's with its values."""
    return completed(file.identifying(FORMAT))


def strangers(flat: Flat, file: RuleFile) -> list[str]:
    """The keys in which a flat config is not a rule file's, least telling last."""
    wanted, carried = expected(file), file.carried(FORMAT)
    open_keys = {*carried}
    for prefix, architecture in architectures(wanted).items():
        part = parts()[architecture]
        open_keys |= {f"{prefix}{key}" for key in (*part.where, *part.free)}
    return [
        key
        for key, value in wanted.items()
        if key not in open_keys and not same(flat.get(key), value)
    ]


def same(value: Any, other: Any) -> bool:
    """Equal, and both truth values if one is: 1 is not True."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _settings(flat: Flat, file: RuleFile) -> dict[str, Any]:
    counts = {name for rule in file.rules for name in sizes_said(rule, file.with_)}
    settings: dict[str, Any] = {}
    for key, setting in file.carried(FORMAT).items():
        value: Any = flat.get(key)
        if not same(settings.get(setting, value), value):
            raise SurgeryError("PSG504", f"the adapter's parts have different values of {key[2:]}")
        if not fits_setting(value, file.with_[setting], setting in counts):
            raise SurgeryError("PSG503", f"the adapter's {key} cannot be {brief(value)}")
        settings[setting] = value
    return settings


def _where(flat: Flat) -> dict[str, dict[str, Any]]:
    """The keys that say where, by kind of site. PSG503 for a value that cannot."""
    where: dict[str, dict[str, Any]] = {}
    for prefix, architecture in architectures(flat).items():
        part = parts()[architecture]
        keys = {key: flat[f"{prefix}{key}"] for key in sorted(part.where)}
        for key, value in keys.items():
            _check_place(f"{prefix}{key}", value, part.defaults[key])
        where[part.kind] = keys
    return where


def _check_place(key: str, value: Any, default: Any) -> None:
    if isinstance(default, bool):
        fits = isinstance(value, bool)
    elif default:
        fits = isinstance(value, list) and all(item in MATRICES for item in value)
    else:
        fits = isinstance(value, list) and all(type(item) is int for item in value)
    if not fits:
        raise SurgeryError("PSG503", f"the adapter's {key} cannot be {brief(value)}")
