"""``peftsurgery doctor``: what is installed, and whether a capture works here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import click

from peftsurgery.cli.kit import json_option, print_result
from peftsurgery.installed import Package, extras_of, machine, packages_needed
from peftsurgery.version import __version__

FOUND = ("threads", "accelerator", "compiled")  # what the trial tells of the machine
CORE = ("torch", "transformers")  # without them nothing is captured, and nothing to be tried


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
    tried = _trial() if present else {"capture_error": "there is nothing to capture with"}
    error = tried.get("capture_error")
    report = {
        "peftsurgery": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": needed,
        "extras": extras_of(packages),
        "untested": [asdict(p) for p in packages if p.state in ("newer", "older")],
        "machine": {**machine(), **{key: tried.get(key) for key in FOUND}},
        "capture_seconds": tried.get("capture_seconds"),
        "capture_error": error,
    }
    print_result(report, "\n".join(_lines(report, packages)), as_json)
    return 0 if error is None else 3


def _trial() -> dict[str, Any]:
    """What trying a capture in a process of its own found, of which this one needs no torch.

    A library that takes its process down with it is an error like others.
    """
    import subprocess

    command = [sys.executable, "-c", "from peftsurgery.cli.trial import main; main()"]
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=here)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
        return {"capture_error": said[0]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _lines(report: dict[str, Any], packages: list[Package]) -> Iterator[str]:
    machine = report["machine"]
    yield f"peftsurgery {report['peftsurgery']}, Python {report['python']}"
    yield report["platform"]
    yield (
        f"{machine['cores']} cores, {machine['threads'] or '?'} threads for torch, "
        f"{machine['free_gib'] or '?'} of {machine['memory_gib'] or '?'} GiB memory free, "
        f"accelerator: {machine['accelerator'] or 'none'}"
    )
    if machine["compiled"] is False:
        yield "folds on files are slower: there was no C compiler when peftsurgery was built"
    if not packages:
        yield "  not installed as a package: which versions were tested is not known"
    for package in packages:
        if package.extra is None:
            yield f"  {package.name:15} {package}"
    for extra, versions in report["extras"].items():
        yield f"  extra {extra:8} {_extra_line(extra, versions, packages)}"
    if report["capture_error"] is None:
        yield f"a trial capture took {report['capture_seconds']} s"
    else:
        yield f"a trial capture failed: {report['capture_error']}"


def _extra_line(extra: str, versions: dict[str, str | None], packages: list[Package]) -> str:
    here = [p for p in packages if p.extra == extra and p.version is not None]
    missing = [name for name, version in versions.items() if version is None]
    texts = [", ".join(f"{package.name} {package}" for package in here)]
    if missing:
        texts.append(f"missing {', '.join(missing)}: pip install 'peftsurgery[{extra}]'")
    return "; ".join(text for text in texts if text)
