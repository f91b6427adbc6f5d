"""What is installed: the packages that this one asks for, and the machine."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any


@dataclass(frozen=True)
class Package:
    """A package that this one asks for: the versions that were tested, and the one that is here.

    ``state`` is ok, missing, newer or older (than what was tested); ``extra`` is None if it is
    always needed.
    """

    name: str
    extra: str | None
    tested: str
    version: str | None
    state: str

    def __str__(self) -> str:
        if self.version is None:
            return "MISSING"
        if self.state == "ok":
            return self.version
        return f"{self.version}  {self.state.upper()} than what was tested ({self.tested})"


def packages_needed() -> Iterator[Package]:
    """The packages that the installed metadata of this one names, those for development left out.

    There is none if this package runs from a directory without having been installed.
    """
    from importlib import metadata  # slow to import, and every `--help` would

    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("peftsurgery") or []
        extras = metadata.metadata("peftsurgery").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return
    for line in lines:
        requirement = Requirement(line)
        marker = requirement.marker
        wanted = [e for e in extras if marker and marker.evaluate({"extra": e})]
        extra = None if marker is None or marker.evaluate({"extra": ""}) else "".join(wanted[:1])
        if extra != "dev":
            version = version_of(requirement.name)
            state = "missing" if version is None else _state(requirement.specifier, version)
            yield Package(requirement.name, extra, str(requirement.specifier), version, state)


def version_of(package: str) -> str | None:
    """The version of a package as it is installed; None if it is not."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def version_beside(package: str) -> str | None:
    """The version of a package as installers leave it beside it; None if none is found there.

    It is that of the first ``NAME-VERSION.dist-info/METADATA`` on the path of imports. Python's own
    library finds others too, but takes longer to import than a command does to find three of these.
    """
    wanted = _spelled_alike(package)
    for folder in sys.path:
        with suppress(OSError):
            for name in os.listdir(folder or os.curdir):
                of, _, rest = name.partition("-")
                if rest.endswith(".dist-info") and _spelled_alike(of) == wanted:
                    with open(os.path.join(folder, name, "METADATA"), encoding="utf-8") as lines:
                        heads = (line.partition(":") for line in takewhile(str.strip, lines))
                        return next((v.strip() for key, _, v in heads if key == "Version"), None)
    return None


def _spelled_alike(package: str) -> str:
    """A package's name, for which installers and people write dashes, dots and capitals."""
    return re.sub(r"[-_.]+", "-", package).lower()


def _state(tested: Any, version: str) -> str:
    """Whether a version is among those of a specifier (ok), or newer or older."""
    if tested.contains(version, prereleases=True):
        return "ok"
    above = [bound for bound in tested if bound.operator in ("<", "<=")]
    return "newer" if any(not b.contains(version, prereleases=True) for b in above) else "older"


def extras_of(packages: list[Package]) -> dict[str, dict[str, str | None]]:
    """The versions of the packages of each extra, None for one that is missing."""
    found: dict[str, dict[str, str | None]] = {}
    for package in packages:
        if package.extra is not None:
            found.setdefault(package.extra, {})[package.name] = package.version
    return found


def machine() -> dict[str, Any]:
    """Number of cores, and memory in GiB; None for unknown."""
    return {
        "cores": os.cpu_count(),
        "memory_gib": _gib("SC_PHYS_PAGES"),
        "free_gib": _gib("SC_AVPHYS_PAGES"),
    }


def _gib(pages: str) -> float | None:
    """So many pages of memory in GiB, where the system tells."""
    try:
        return round(os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
