"""``peftsurgery why``: which clause kept or dropped a site."""

from __future__ import annotations

from pathlib import Path

import click

from peftsurgery.cli.apply import set_option
from peftsurgery.cli.kit import clean, json_option, print_json


@click.command()
@click.argument("model", metavar="MODEL|SURGERY")
@click.argument("rule")
@click.argument("path")
@set_option
@json_option
def why(model: str, rule: str, path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Say why RULE keeps or drops the module or parameter PATH of MODEL.

    In a saved surgery, RULE may be an adapter's name; a rule that was applied there is meant as it
    was applied, with its settings and its narrowing. Its base's weights are not looked at.
    """
    from peftsurgery.cli.model import base_of, selections
    from peftsurgery.language import check_settings, load_rules, parse_overrides, resolve_settings
    from peftsurgery.language import why as explain
    from peftsurgery.surgery.model.surgery_files import saved_operations
    from peftsurgery.surgery.plan.cut import Operation

    # before the model: what is misspelt is known at once
    settings, operations = parse_overrides(overrides), saved_operations(Path(model))
    meant = [op for op in operations if rule in (op.name, op.file.name)]
    if not meant:
        file = load_rules(rule)
        meant = operations = [Operation(file, resolve_settings(file), file.name)]
    check_settings([operation.file for operation in meant], settings)
    chosen = selections(base_of(model), operations, meant, settings)
    answers = [(selection, explain(selection, path)) for selection in chosen]
    if as_json:
        print_json(
            [
                {
                    "rule": selection.name,
                    "path": path,
                    "kept": any(path in (site.module, site.parameter) for site in selection.kept),
                    "why": answer,
                    "counts": dict(selection.counts()),
                }
                for selection, answer in answers
            ]
        )
        return
    for selection, answer in answers:
        click.echo(f"{selection.name}\n{clean(answer)}")
        for text, count in selection.counts():
            click.echo(f"{count:5d}  {text}")
