"""Fusion: rules over other adapters, whose values they bind as ``outputs``.

    over: [a, b]        outputs = stack(a(y), b(y))        y as it was before a and b

The adapters are in the model, with their parameters; at the fusion's sites their cuts are made
inside its own. A fusion covers every site of each of its adapters, or it is refused: nobody expects
an adapter that was fused to go on changing the model somewhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peftsurgery.anatomy.site import Site
from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.surgery.plan.cut import Cut, Operation
from peftsurgery.surgery.plan.mode import Mode

Spot = tuple[str, Site]
Fused = tuple[tuple[Cut, ...], ...]
"""For each adapter, the cuts it makes at one site, in order."""


def fused_names(operation: Operation) -> tuple[str, ...]:
    """The names of the adapters that the rules of an operation are over."""
    names = (name for rule in operation.file.rules for name in rule.fused(operation.settings))
    return tuple(dict.fromkeys(names))


def check_fusions(operations: Sequence[Operation]) -> None:
    """Refuse an operation over an adapter that was not applied before it. PSG340."""
    for number, operation in enumerate(operations):
        known = [earlier.name for earlier in operations[:number]]
        for rule in operation.file.rules:
            if rule.over and not rule.fused(operation.settings):
                raise SurgeryError(
                    "PSG340",
                    f"'{operation.name}' is over other adapters, and none is named",
                    f"name those that it combines, of {', '.join(known) or 'those applied before'}",
                )
        for name in fused_names(operation):
            if name not in known:
                raise SurgeryError(
                    "PSG340",
                    f"'{operation.name}' is over '{name}', and no adapter of that name was applied "
                    "before it",
                    did_you_mean(name, known) if known else "the model has no adapters yet",
                )


def check_fused(operations: Iterable[Operation], cuts: Sequence[Cut]) -> None:
    """Refuse fusions whose adapters do not have all their sites in common. PSG341."""
    fusions = {part: cut for cut in cuts for group in cut.over for part in group}
    over = {part.operation.name: cut.operation.name for part, cut in fusions.items()}
    for operation in operations:
        names = fused_names(operation)
        if names and operation.name not in over.values():
            raise SurgeryError(
                "PSG341",
                f"{' and '.join(names)} have no site in common that '{operation.name}' matches",
                "all the adapters of a fusion must have the same sites",
            )
    for cut in cuts:
        fusion = over.get(cut.operation.name)
        if fusion is not None and cut not in fusions and cut.rule.rewrite:
            raise SurgeryError(
                "PSG341",
                f"'{cut.operation.name}' also cuts at {cut.placed.module}, where '{fusion}' does "
                "not combine it",
                "all the adapters of a fusion must have the same sites, and its `where:` must keep "
                "them",
            )


def check_unused(name: str, operations: Iterable[Operation]) -> None:
    """Refuse to take out an adapter that a fusion is over. PSG342."""
    for operation in operations:
        if name in fused_names(operation):
            message = f"'{operation.name}' is over '{name}', which cannot be taken out alone"
            raise SurgeryError("PSG342", message, f"take '{operation.name}' out first")


def common_spots(names: Sequence[str], earlier: Iterable[Cut]) -> dict[Spot, Fused]:
    """Sites where all of the adapters cut, with each adapter's cuts there.

    PSG341 if one of them rewrites something else than its site's result.
    """
    found: dict[Spot, dict[str, tuple[Cut, ...]]] = {}
    for cut in earlier:
        if cut.operation.name in names and cut.rule.rewrite:
            if cut.rule.rewrite.keys() != {cut.rule.kind.result}:
                rewritten = ", ".join(cut.rule.rewrite)
                raise SurgeryError(
                    "PSG341",
                    f"'{cut.operation.name}' rewrites {rewritten} at {cut.placed.module}: only "
                    "what a site computes can be combined",
                )
            at = found.setdefault((cut.placed.block, cut.site), {})
            at[cut.operation.name] = (*at.get(cut.operation.name, ()), cut)
    return {
        spot: tuple(at[name] for name in names)
        for spot, at in found.items()
        if at.keys() == set(names)
    }


def taking_part(cuts: Iterable[Cut], mode: Mode) -> list[Cut]:
    """Cuts that are made in a mode: none inside a fusion, none in a layer left out."""
    active = [cut for cut in cuts if cut.operation.name in mode.names]
    alone = active if mode.by_row else sewn(active)  # a row has the one or the other
    return [cut for cut in alone if mode.takes_part(cut)]


def sewn(cuts: Sequence[Cut]) -> list[Cut]:
    """Cuts made by themselves: all but those evaluated inside a fusion."""
    inner = {part for cut in cuts for group in cut.over for part in group}
    return [cut for cut in cuts if cut not in inner]
