"""``peftsurgery doctor``: what is installed, and whether a capture works here."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import click

from peftsurgery.cli.kit import json_option, print_json
from peftsurgery.errors import SurgeryError, first_line
from peftsurgery.version import __version__

CORE = ("torch", "transformers")  # without them nothing is captured, and nothing to be tried


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


@click.command()
@json_option
def doctor(as_json: bool) -> int:
    """Show versions, missing extras and the machine, and capture a tiny model as a trial.

    Versions are those that are installed; beside one that is newer or older than what was tested
    stands what was.
    """
    import platform

    packages = list(packages_needed())
    needed = {package.name: package.version for package in packages if package.extra is None}
    present = all(needed.get(name, "") is not None for name in CORE)
    seconds, error = _trial() if present else (None, "there is nothing to capture with")
    report = {
        "peftsurgery": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": needed,
        "extras": _extras(packages),
        "untested": [asdict(p) for p in packages if p.state in ("newer", "older")],
        "machine": _machine(present),
        "capture_seconds": seconds,
        "capture_error": error,
    }
    if as_json:
        print_json(report)
    else:
        _print(report, packages)
    return 0 if error is None else 3


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
            version = _version(requirement.name)
            state = "missing" if version is None else _state(requirement.specifier, version)
            yield Package(requirement.name, extra, str(requirement.specifier), version, state)


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _state(tested: Any, version: str) -> str:
    """Whether a version is among those of a specifier (ok), or newer or older."""
    if tested.contains(version, prereleases=True):
        return "ok"
    above = [bound for bound in tested if bound.operator in ("<", "<=")]
    return "newer" if any(not b.contains(version, prereleases=True) for b in above) else "older"


def _extras(packages: list[Package]) -> dict[str, dict[str, str | None]]:
    found: dict[str, dict[str, str | None]] = {}
    for package in packages:
        if package.extra is not None:
            found.setdefault(package.extra, {})[package.name] = package.version
    return found


def _machine(with_torch: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "cores": os.cpu_count(),
        "threads": None,
        "memory_gib": _gib("SC_PHYS_PAGES"),
        "free_gib": _gib("SC_AVPHYS_PAGES"),
        "accelerator": None,
    }
    if with_torch:
        import torch

        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["accelerator"] = torch.cuda.get_device_name()
    return found


def _gib(pages: str) -> float | None:
    """So many pages of memory in GiB, where the system tells."""
    try:
        return round(os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _trial() -> tuple[float | None, str | None]:
    """Capture a tiny module and run it: the seconds it took, or why it cannot be done here."""
    start = time.perf_counter()
    try:
        import torch
        from torch import nn

        from peftsurgery.capture import capture

        module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
        inputs = torch.ones(3, 4)
        model = capture(module, inputs=(inputs,))
        torch.testing.assert_close(model(inputs), module(inputs))
    except (ImportError, SurgeryError, AssertionError) as error:
        return None, first_line(error)
    return round(time.perf_counter() - start, 2), None


def _print(report: dict[str, Any], packages: list[Package]) -> None:
    machine = report["machine"]
    click.echo(f"peftsurgery {report['peftsurgery']}, Python {report['python']}")
    click.echo(report["platform"])
    click.echo(
        f"{machine['cores']} cores, {machine['threads'] or '?'} threads for torch, "
        f"{machine['free_gib'] or '?'} of {machine['memory_gib'] or '?'} GiB memory free, "
        f"accelerator: {machine['accelerator'] or 'none'}"
    )
    if not packages:
        click.echo("  not installed as a package: which versions were tested is not known")
    for package in packages:
        if package.extra is None:
            click.echo(f"  {package.name:15} {package}")
    for extra, versions in report["extras"].items():
        click.echo(f"  extra {extra:8} {_extra_line(extra, versions, packages)}")
    if report["capture_error"] is None:
        click.echo(f"a trial capture took {report['capture_seconds']} s")
    else:
        click.echo(f"a trial capture failed: {report['capture_error']}")


def _extra_line(extra: str, versions: dict[str, str | None], packages: list[Package]) -> str:
    here = [p for p in packages if p.extra == extra and p.version is not None]
    missing = [name for name, version in versions.items() if version is None]
    texts = [", ".join(f"{package.name} {package}" for package in here)]
    if missing:
        texts.append(f"missing {', '.join(missing)}: pip install 'peftsurgery[{extra}]'")
    return "; ".join(text for text in texts if text)
