"""``peftsurgery why``: which clause kept or dropped a site."""

from __future__ import annotations

import click

from peftsurgery.cli.apply import set_option
from peftsurgery.cli.kit import clean, json_option, print_json


@click.command()
@click.argument("model")
@click.argument("rule")
@click.argument("path")
@set_option
@json_option
def why(model: str, rule: str, path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Say why RULE keeps or drops the module or parameter PATH of MODEL."""
    from peftsurgery.cli.model import open_model, selections
    from peftsurgery.language import check_settings, load_rules, parse_overrides
    from peftsurgery.language import why as explain

    # before the model: what is misspelt is known at once
    file, settings = load_rules(rule), parse_overrides(overrides)
    check_settings([file], settings)
    chosen = selections(open_model(model), file, settings)
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
