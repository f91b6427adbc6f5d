"""MODEL on the command line: opened once for every command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftsurgery.cli.progress import doing

if TYPE_CHECKING:
    from peftsurgery.capture import GraphModel


def open_model(spec: str, allow_other_base: bool = False) -> GraphModel:
    """The captured model that ``spec`` names; a saved surgery is loaded with its operations."""
    with doing(f"capturing {spec}"):
        from peftsurgery.surgery import loading

        return loading.open_model(spec, allow_other_base)


def base_of(spec: str) -> GraphModel:
    """The captured model that ``spec`` names; that of a saved surgery is its base alone."""
    with doing(f"capturing {spec}"):
        from peftsurgery.surgery import loading

        return loading.open_base(spec)
