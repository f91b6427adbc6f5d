"""``peftsurgery doctor``: what is installed, and whether a capture works here."""

from __future__ import annotations

import os
import time
from typing import Any

import click

from peftsurgery import __version__
from peftsurgery.cli.kit import json_option, print_json

REQUIRED = (
    "torch",
    "transformers",
    "safetensors",
    "networkx",
    "click",
    "pydantic",
    "PyYAML",
    "regex",
    "rich",
)
OPTIONAL = {
    "peft": ("peft",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "models": ("gguf",),
    "quantise": ("bitsandbytes",),
}


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show versions, missing extras and the machine, and capture a tiny model as a trial."""
    import platform

    report = {
        "peftsurgery": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in REQUIRED},
        "extras": {extra: {p: _version(p) for p in names} for extra, names in OPTIONAL.items()},
        "machine": _machine(),
        "capture_seconds": _trial(),
    }
    if as_json:
        print_json(report)
    else:
        _print(report)


def _version(package: str) -> str | None:
    from importlib import metadata  # slow to import, and every `--help` would

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    import torch

    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _gib("SC_PHYS_PAGES"),
        "free_gib": _gib("SC_AVPHYS_PAGES"),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _gib(pages: str) -> float | None:
    """So many pages of memory in GiB, where the system tells."""
    try:
        return round(os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _trial() -> float:
    """Capture a tiny module and run it: the seconds it took. Errors are the command's."""
    import torch
    from torch import nn

    from peftsurgery.capture import capture

    start = time.perf_counter()
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    inputs = torch.ones(3, 4)
    model = capture(module, inputs=(inputs,))
    torch.testing.assert_close(model(inputs), module(inputs))
    return round(time.perf_counter() - start, 2)


def _print(report: dict[str, Any]) -> None:
    machine = report["machine"]
    click.echo(f"peftsurgery {report['peftsurgery']}, Python {report['python']}")
    click.echo(report["platform"])
    click.echo(
        f"{machine['cores']} cores, {machine['threads']} threads for torch, "
        f"{machine['free_gib'] or '?'} of {machine['memory_gib'] or '?'} GiB memory free, "
        f"accelerator: {machine['accelerator'] or 'none'}"
    )
    for name, version in report["packages"].items():
        click.echo(f"  {name:14} {version or 'MISSING'}")
    for extra, packages in report["extras"].items():
        missing = [name for name, version in packages.items() if version is None]
        found = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
        hint = f"missing {', '.join(missing)}: pip install 'peftsurgery[{extra}]'"
        click.echo(
            f"  extra {extra:8} {'; '.join(text for text in (found, missing and hint) if text)}"
        )
    click.echo(f"a trial capture took {report['capture_seconds']} s")
