"""``peftsurgery rules``: the shipped rules, and help with one's own."""

from __future__ import annotations

from pathlib import Path

import click

from peftsurgery.cli.kit import Group, json_option, print_json
from peftsurgery.cli.output import force_option, fresh


@click.group(cls=Group)
def rules() -> None:
    """List, show, copy and check rule files."""


@rules.command()
@json_option
def ls(as_json: bool) -> None:
    """List the shipped rules."""
    from peftsurgery.language import load_rules, shipped

    files = [load_rules(name) for name in shipped()]
    if as_json:
        print_json([{"name": f.name, "about": _line(f.about), "settings": f.with_} for f in files])
        return
    width = max((len(file.name) for file in files), default=0)
    for file in files:
        click.echo(f"{file.name:{width}}  {_line(file.about)}")


@rules.command()
@click.argument("rule")
@json_option
def show(rule: str, as_json: bool) -> None:
    """Print the rule file RULE."""
    from peftsurgery.language import load_rules

    file = load_rules(rule)
    path = _path(rule)
    text = path.read_text(encoding="utf-8")
    if as_json:
        print_json({"name": file.name, "path": str(path), "settings": file.with_, "text": text})
    else:
        click.echo(text, nl=not text.endswith("\n"))


@rules.command()
@click.argument("rule")
@click.argument("out", type=click.Path(path_type=Path))
@force_option
@json_option
def cp(rule: str, out: Path, force: bool, as_json: bool) -> None:
    """Copy the rule file RULE to OUT, to start one's own from it."""
    from peftsurgery.language import load_rules

    load_rules(rule)  # a misspelt name is refused with the nearest right one
    target = out / f"{_path(rule).stem}.yaml" if out.is_dir() else out
    with fresh(target, force=force) as part:
        part.write_bytes(_path(rule).read_bytes())
    if as_json:
        print_json({"rule": rule, "out": str(target)})
    else:
        click.echo(f"wrote {target}")


@rules.command()
@json_option
def schema(as_json: bool) -> None:
    """Print the JSON schema of rule files, for editors."""
    from peftsurgery.language import json_schema

    print_json(json_schema())


def _path(rule: str) -> Path:
    from peftsurgery.language import shipped

    return shipped().get(rule, Path(rule))


def _line(text: str) -> str:
    """The first sentence of a text, on one line."""
    return " ".join(text.split()).partition(". ")[0].rstrip(".")
