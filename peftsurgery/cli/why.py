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
    from peftsurgery.language import load_rules
    from peftsurgery.language import why as explain

    load_rules(rule)  # a misspelt name is known before the model is captured
    chosen = selections(open_model(model), rule, overrides)
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
