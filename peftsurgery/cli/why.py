"""``peftsurgery why``: which clause kept or dropped a site."""

from __future__ import annotations

from pathlib import Path

import click

from peftsurgery.cli.apply import set_option
from peftsurgery.cli.kit import json_option, print_result


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
    from peftsurgery.cli.model import base_of
    from peftsurgery.language.loading import load_rules
    from peftsurgery.language.settings import check_settings, parse_overrides, resolve_settings
    from peftsurgery.surgery.asking import explained
    from peftsurgery.surgery.model.saved.manifest import saved_operations
    from peftsurgery.surgery.plan.cut import Operation

    # before the model: what is misspelt is known at once
    settings, operations = parse_overrides(overrides), saved_operations(Path(model))
    meant = [op for op in operations if rule in (op.name, op.file.name)]
    if not meant:
        file = load_rules(rule)
        meant = operations = [Operation(file, resolve_settings(file), file.name)]
    check_settings([operation.file for operation in meant], settings)
    found = explained(base_of(model).base_capture, operations, meant, path, settings)
    print_result(found.to_dict()["rules"], found, as_json)
