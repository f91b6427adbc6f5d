"""Setups of AdapterHub's library: a fusion with the adapters that it combines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftsurgery.errors import SurgeryError
from peftsurgery.formats.adapterhub.files import FUSION, SETUP, read_hub_config
from peftsurgery.formats.adapterhub.library import FUSED, parts, version
from peftsurgery.formats.words import config_bytes, read_config
from peftsurgery.surgery.plan.cut import adapter_name


def is_setup(folder: Path) -> bool:
    """Whether a directory holds a setup rather than one adapter."""
    return (folder / SETUP).is_file()


def read_setup(folder: Path) -> list[str]:
    """The names of the adapters that are fused. PSG504 for any other setup."""
    setup = read_config(folder, SETUP)
    fuse = setup.get("adapter_setup")
    children = fuse.get("children") if isinstance(fuse, dict) else None
    names = [_single(child) for child in children] if isinstance(children, list) else []
    if not isinstance(fuse, dict) or fuse.get("type") != "Fuse" or len(names) < 2:
        kind = fuse.get("type") if isinstance(fuse, dict) else fuse
        message = f"the setup is {kind!r}, and only a Fuse of two adapters or more is honoured"
        raise SurgeryError("PSG504", message, "load its adapters one by one")
    if setup.get("head_setup"):
        raise SurgeryError("PSG504", f"the setup has heads of its own: {setup['head_setup']!r}")
    return names


def _single(child: Any) -> str:
    names = child.get("children") if isinstance(child, dict) else None
    if isinstance(names, list) and len(names) == 1 and child.get("type") == "single":
        return adapter_name(str(names[0]))
    raise SurgeryError("PSG504", f"a part of the setup is {child!r}, not one adapter's name")


def fusion_config(folder: Path, names: Sequence[str], last: dict[str, Any]) -> dict[str, Any]:
    """A fusion's config as one of the library's adapters: with what it takes from the last one.

    The library's fusion asks with what the last adapter reads, so that adapter's config belongs to
    it; see ``library.yaml``.
    """
    values = read_hub_config(folder / ",".join(names), FUSION)
    config = values.get("config")
    if not isinstance(config, dict) or values.get("adapter_names") != list(names):
        message = f"the fusion of {', '.join(names)} is for {values.get('adapter_names')!r}"
        raise SurgeryError("PSG503", message, "its config and the setup contradict each other")
    taken = {key: last[key] for key in parts()[FUSED].taken if key in last}
    return {**values, "config": {"architecture": FUSED, "adapter_names": names, **config, **taken}}


def as_fusion(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a fusion as the library writes it: the inverse of :func:`fusion_config`."""
    taken = (*parts()[FUSED].taken, "architecture")
    own = {key: value for key, value in config["config"].items() if key not in taken}
    return {**config, "config": own, "adapter_names": config["config"]["adapter_names"]}


def setup_content(names: Sequence[str]) -> bytes:
    """The file that says which adapters are fused."""
    children = [{"type": "single", "children": [name]} for name in names]
    fuse = {"type": "Fuse", "children": children}
    return config_bytes({"adapter_setup": fuse, "head_setup": None, "version": version()})
