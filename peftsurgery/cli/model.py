"""MODEL on the command line: opened once for every command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftsurgery.cli.progress import doing

if TYPE_CHECKING:
    from peftsurgery.capture import GraphModel
    from peftsurgery.language import Selection


def open_model(spec: str) -> GraphModel:
    """The captured model that ``spec`` names; a saved surgery is loaded with its operations."""
    with doing(f"capturing {spec}"):
        from peftsurgery import surgery

        return surgery.open_model(spec)


def selections(model: GraphModel, rule: str, overrides: tuple[str, ...]) -> list[Selection]:
    """What each rule of a rule file selects in a model."""
    from peftsurgery.language import load_rules, parse_override, resolve_settings
    from peftsurgery.surgery import Operation, select_cuts

    file = load_rules(rule)
    settings = resolve_settings(file, dict(parse_override(text) for text in overrides))
    _, chosen = select_cuts(model.base_capture, Operation(file, settings, file.name))
    return chosen
