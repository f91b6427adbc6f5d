"""The rule files that come with the package, found and listed without reading what they do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

from peftsurgery.language.document import read_document

_PACKAGE = Path(__file__).resolve().parent.parent


@cache
def shipped() -> Mapping[str, Path]:
    """The rule files that come with the package, by name."""
    installed, checkout = _PACKAGE / "rules", _PACKAGE.parent / "rules"
    folder = installed if installed.is_dir() else checkout
    return MappingProxyType({path.stem: path for path in sorted(folder.glob("*.yaml"))})


def shipped_titles() -> Iterator[tuple[str, str]]:
    """The name and the description of each of them, as its page says them."""
    for name, path in shipped().items():
        page = read_document(path.read_bytes(), name).data
        yield page["name"], page["about"]
