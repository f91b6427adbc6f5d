"""``peftsurgery explain``: what an error code means."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from peftsurgery.cli.kit import json_option, print_result
from peftsurgery.codes import CODES
from peftsurgery.errors import SurgeryError, closest


@click.command()
@click.argument("code", required=False)
@json_option
def explain(code: str | None, as_json: bool) -> None:
    """Explain an error CODE such as PSG301, or list all of them."""
    if code is None:
        listed = "\n".join(f"{name}  {CODES[name].title}" for name in sorted(CODES))
        print_result([_entry(name) for name in sorted(CODES)], listed, as_json)
        return
    name = f"PSG{code}" if code.isdecimal() else code.upper()
    if name not in CODES:
        near = closest(name, CODES)
        hint = f"did you mean '{near}'?" if near else "`peftsurgery explain` lists all of them"
        raise SurgeryError("PSG903", f"there is no error code '{code}'", hint)
    info = CODES[name]
    words = f"{name}: {info.title}\n\n{info.explanation}\n\nexit code {info.exit_code}"
    print_result(_entry(name), words, as_json)


def _entry(name: str) -> dict[str, Any]:
    return {"code": name, **asdict(CODES[name])}
