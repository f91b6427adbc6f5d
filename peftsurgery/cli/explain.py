"""``peftsurgery explain``: what an error code means."""

from __future__ import annotations

import click

from peftsurgery.cli.kit import json_option, print_json
from peftsurgery.codes import CODES
from peftsurgery.errors import SurgeryError, closest


@click.command()
@click.argument("code", required=False)
@json_option
def explain(code: str | None, as_json: bool) -> None:
    """Explain an error CODE such as PSG301, or list all of them."""
    if code is None:
        if as_json:
            print_json([_entry(name) for name in sorted(CODES)])
        else:
            click.echo("\n".join(f"{name}  {CODES[name].title}" for name in sorted(CODES)))
        return
    name = f"PSG{code}" if code.isdecimal() else code.upper()
    if name not in CODES:
        near = closest(name, CODES)
        hint = f"did you mean '{near}'?" if near else "`peftsurgery explain` lists all of them"
        raise SurgeryError("PSG903", f"there is no error code '{code}'", hint)
    if as_json:
        print_json(_entry(name))
    else:
        info = CODES[name]
        click.echo(f"{name}: {info.title}\n\n{info.explanation}\n\nexit code {info.exit_code}")


def _entry(name: str) -> dict[str, object]:
    info = CODES[name]
    return {
        "code": name,
        "title": info.title,
        "explanation": info.explanation,
        "exit_code": info.exit_code,
    }
