"""MODEL on the command line: opened once for every command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftsurgery.cli.progress import doing

if TYPE_CHECKING:
    from peftsurgery.capture import GraphModel
    from peftsurgery.language import RuleFile, Selection


def open_model(spec: str) -> GraphModel:
    """The captured model that ``spec`` names; a saved surgery is loaded with its operations."""
    with doing(f"capturing {spec}"):
        from peftsurgery import surgery

        return surgery.open_model(spec)


def selections(model: GraphModel, file: RuleFile, settings: Mapping[str, Any]) -> list[Selection]:
    """What each rule of a rule file selects in a model."""
    from peftsurgery.language import resolve_settings
    from peftsurgery.surgery import Operation, select_cuts

    resolved = resolve_settings(file, settings)
    _, chosen = select_cuts(model.base_capture, Operation(file, resolved, file.name))
    return chosen
