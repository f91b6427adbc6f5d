"""MODEL on the command line: opened once for every command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peftsurgery.cli.progress import doing

if TYPE_CHECKING:
    from peftsurgery.capture import GraphModel
    from peftsurgery.language import Selection


def open_model(spec: str) -> GraphModel:
    """The captured model that ``spec`` names; a saved surgery is loaded with its operations.

    A path is made absolute: a surgery remembers its base, and is used from other directories too.
    """
    if Path(spec).exists():
        spec = str(Path(spec).absolute())
    with doing(f"capturing {spec}"):
        from peftsurgery import surgery

        return surgery.open_model(spec)


def selections(model: GraphModel, rule: str, overrides: tuple[str, ...]) -> list[Selection]:
    """What each rule of a rule file selects in a model."""
    from peftsurgery.anatomy import survey
    from peftsurgery.language import load_rules, parse_override, resolve_settings, select

    file = load_rules(rule)
    settings = resolve_settings(file, dict(parse_override(text) for text in overrides))
    sites = survey(model.captures[0])
    return [
        select(sites, each, settings, file.roles, f"{file.name}.rules[{index}]")
        for index, each in enumerate(file.rules)
    ]
