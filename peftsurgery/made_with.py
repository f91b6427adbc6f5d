"""With what a file was made, and when: versions of packages, and the time."""

from __future__ import annotations

import os
from datetime import UTC, datetime

from peftsurgery.installed import version_beside, version_of
from peftsurgery.version import __version__

_PACKAGES = ("torch", "transformers", "peftsurgery")


def now() -> str:
    """The time in UTC, in seconds; SOURCE_DATE_EPOCH instead, where a build is to be repeatable."""
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    moment = datetime.fromtimestamp(int(given), UTC) if given.isdecimal() else datetime.now(UTC)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def versions() -> dict[str, str]:
    """The versions of the packages that what is computed depends on."""
    # this package may run from a checkout
    found = {name: version_beside(name) or version_of(name) for name in _PACKAGES}
    return {name: version or __version__ for name, version in found.items()}
