"""``peftsurgery rules``: the shipped rules, and help with one's own."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import click

from peftsurgery.cli.apply import set_option
from peftsurgery.cli.kit import Group, force_option, json_option, print_json, print_result
from peftsurgery.outputs import fresh


@click.group(cls=Group)
def rules() -> None:
    """List, show, copy and check rule files."""


@rules.command()
@json_option
def ls(as_json: bool) -> None:
    """List the shipped rules."""
    from peftsurgery.language.shipped import shipped_titles

    titles = dict(shipped_titles())
    width = max(map(len, titles), default=0)
    lines = (_fitted(f"{name:{width}}  {_line(about)}") for name, about in titles.items())
    print_result(_listed() if as_json else titles, "\n".join(lines), as_json)


@rules.command()
@click.argument("rule")
@click.option("--yaml", "as_yaml", is_flag=True, help="Print it as a file that stands by itself.")
@json_option
def show(rule: str, as_yaml: bool, as_json: bool) -> None:
    """Print what the rule file RULE does, in words and maths."""
    from peftsurgery.language.describe import describe_rules
    from peftsurgery.language.loading import load_rules, page_of

    file, text = load_rules(rule), page_of(rule)
    description = describe_rules(file)
    document = {"name": file.name, "settings": file.with_, "about": file.about}
    document |= {"description": description, "text": text}
    print_result(document, (text if as_yaml else description).rstrip("\n"), as_json)


@rules.command()
@click.argument("rules", metavar="RULE...", nargs=-1, required=True)
@set_option
@click.option(
    "--size",
    "sizes",
    metavar="NAME=N",
    multiple=True,
    help="A size of the sites that the rules are tried on: in=64.",
)
@json_option
def check(
    rules: tuple[str, ...], overrides: tuple[str, ...], sizes: tuple[str, ...], as_json: bool
) -> None:
    """Prove on random tensors, without a model, that each RULE fits and folds.

    The rewrite must keep the shape of what it replaces, and the operation with the folded weights
    must equal the rewritten one to 1e-9 in double precision. Sizes that a rule is not for are
    passed over for larger ones, unless --size says what they are.
    """
    from peftsurgery.language.checking import check_rules
    from peftsurgery.language.loading import load_rules
    from peftsurgery.language.settings import parse_overrides

    files = [load_rules(rule) for rule in rules]
    settings = parse_overrides(overrides)
    wanted = parse_overrides(sizes)
    reports = [check_rules(file, settings, sizes=wanted) for file in files]
    print_result([report.to_dict() for report in reports], "\n".join(map(str, reports)), as_json)


@rules.command()
@click.argument("rule")
@click.argument("out", type=click.Path(path_type=Path))
@force_option
@json_option
def cp(rule: str, out: Path, force: bool, as_json: bool) -> None:
    """Copy the rule file RULE to OUT, to start one's own from it.

    One that stands on another is copied whole. A page of `base: RULE` and what is to be other is
    often all that one needs instead.
    """
    from peftsurgery.language.loading import load_rules, page_of

    file = load_rules(rule)  # a misspelt name is refused with the nearest right one
    target = out / f"{file.sources[0].stem}.yaml" if out.is_dir() else out
    with fresh(target, file.sources, force) as part:
        part.write_text(page_of(rule), encoding="utf-8")
    print_result({"rule": rule, "out": str(target)}, f"wrote {target}", as_json)


@rules.command()
@json_option
def words(as_json: bool) -> None:
    """List what a rule may say: the kinds of sites with the names they bind, and the operators."""
    from peftsurgery.language.kinds import KINDS
    from peftsurgery.language.operators import OPERATORS

    sites = {
        kind.name: {
            "about": kind.doc,
            "values": kind.values,
            "weights": kind.weights,
            "sizes": kind.sizes,
            "functions": [function.usage for function in kind.functions.values()],
        }
        for kind in KINDS.values()
    }
    operators = {one.usage: _line(one.doc) for one in OPERATORS.values()}
    lines = []
    for name, site in sites.items():
        lines.append(f"{name}: {site['about']}")
        given = ((what, names) for what, names in site.items() if what != "about" and names)
        lines += [f"  {what:9}  {', '.join(names)}" for what, names in given]
    width = max(map(len, operators))
    lines += [f"{usage:{width}}  {about}" for usage, about in operators.items()]
    print_result({"sites": sites, "operators": operators}, "\n".join(lines), as_json)


@rules.command()
@json_option
def schema(as_json: bool) -> None:
    """Print the JSON schema of rule files, for editors."""
    from peftsurgery.language.rule_file import json_schema

    print_json(json_schema())


def _listed() -> list[dict[str, Any]]:
    """The shipped rules with their settings, as JSON has them."""
    from peftsurgery.language.loading import load_rules
    from peftsurgery.language.shipped import shipped

    files = (load_rules(name) for name in shipped())
    return [{"name": f.name, "about": _line(f.about), "settings": f.with_} for f in files]


def _fitted(line: str) -> str:
    """A line cut to the terminal's width; a pipe gets it whole."""
    columns = shutil.get_terminal_size().columns
    if not sys.stdout.isatty() or len(line) <= columns:
        return line
    return f"{line[: columns - 1].rstrip()}…"


def _line(text: str) -> str:
    """The first sentence of a text, on one line."""
    return " ".join(text.split()).partition(". ")[0].rstrip(".")
