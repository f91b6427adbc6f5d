"""MODEL on the command line: opened once for every command."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peftsurgery.cli.progress import doing

if TYPE_CHECKING:
    from peftsurgery.capture import GraphModel
    from peftsurgery.language import Selection
    from peftsurgery.surgery.plan.cut import Operation


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


def selections(
    model: GraphModel,
    operations: Sequence[Operation],
    meant: Collection[Operation],
    settings: Mapping[str, Any],
) -> list[Selection]:
    """What each rule of the operations that are ``meant`` selects in a model, with ``settings``.

    The others are those before and after it, whose places a rule may refer to.
    """
    from peftsurgery.language import resolve_settings, settings_of
    from peftsurgery.surgery.plan.cut import Cut
    from peftsurgery.surgery.plan.select import select_cuts

    cuts: list[Cut] = []
    found: list[Selection] = []
    for operation in operations:
        given = {**operation.own_settings, **settings_of(operation.file, settings)}
        resolved = resolve_settings(operation.file, given) if operation in meant else {}
        chosen = replace(operation, settings=resolved) if operation in meant else operation
        made, selected = select_cuts(model.base_capture, chosen, cuts)
        cuts += made
        found += selected if operation in meant else []
    return found
