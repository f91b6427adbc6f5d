"""Narrowing: clauses and settings by place that a user adds to every rule of a file.

    where = {"layers": "4.."}                           the rules cut there alone
    by = [{"where": {"layers": "6.."}, "rank": 16}]     at these sites with other settings

Sites with settings of their own are an operation of their own under the adapter's name; the first
entry of ``by`` that a site satisfies is the one that counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peftsurgery.capture import Capture
from peftsurgery.errors import SurgeryError, check_argument
from peftsurgery.language.describe import describe_where
from peftsurgery.language.rule_file import RuleFile
from peftsurgery.language.settings import check_settings, resolve_settings, settings_of
from peftsurgery.language.where import EVERYWHERE, Where, where_of
from peftsurgery.surgery.plan.cut import Cut, Operation
from peftsurgery.surgery.plan.select import select_cuts


@dataclass(frozen=True)
class Entry:
    """One entry of ``by``: at the sites of ``where``, other ``settings``."""

    where: Where
    settings: Mapping[str, Any]


def where_given(where: Any, argument: str = "apply(where=)") -> Where:
    """Validate the clauses that narrow rules. Raises PSG904, PSG105 or PSG106."""
    if where is None:
        return EVERYWHERE
    check_argument(argument, where, (Mapping, Where), "a dict of clauses")
    return where_of(where, argument)


def by_given(by: Any, files: Sequence[RuleFile]) -> list[Entry]:
    """Validate the entries of ``by``. Raises PSG904, PSG120 or PSG121."""
    wanted = "a list of dicts, each with `where` and settings"
    check_argument("apply(by=)", by, (list, tuple), wanted)
    entries = []
    for given in by:
        check_argument("apply(by=)", given, Mapping, wanted)
        where = where_given(given.get("where"), "apply(by=)")
        settings = {name: value for name, value in given.items() if name != "where"}
        if not where.given() or not settings:
            message = f"apply(by=): {given!r:.80} does not say where, or has no settings"
            raise SurgeryError("PSG904", message, wanted)
        check_settings(files, settings)
        entries.append(Entry(where, settings))
    return entries


def narrowed(operation: Operation, where: Where, by: Sequence[Entry]) -> list[Operation]:
    """Split an operation: one for each entry of ``by``, and one for all other sites.

    An entry whose settings the rule file does not have is not about its sites.
    """
    made: list[Operation] = []
    before: list[Where] = []
    for entry in by:
        own = settings_of(operation.file, entry.settings)
        if own:
            settings = resolve_settings(operation.file, {**operation.own_settings, **own})
            place = _all([where, entry.where], before)
            made.append(replace(operation, settings=settings, where=place))
            before.append(entry.where)
    return [*made, replace(operation, where=_all([where], before))]


def check_narrowed(
    groups: Iterable[Sequence[Operation]], cuts: Iterable[Cut], capture: Capture
) -> None:
    """Refuse a narrowing that leaves no site, or an entry of ``by`` that no site satisfies. PSG301.

    PSG332 for one that leaves keys more than there are positions.
    ``groups`` are what :func:`narrowed` made, and ``cuts`` all that are made in ``capture``.
    """
    cutting = {id(cut.operation) for cut in cuts}
    for group in groups:
        empty = [operation for operation in group if id(operation) not in cutting]
        needed = group if len(empty) == len(group) else group[:-1]
        for operation in empty:
            if operation in needed and operation.where.given():
                text = describe_where(operation.where)
                message = f"{operation.name}: no site is left where {text}"
                trails = (chosen.trail() for chosen in select_cuts(capture, operation)[1])
                raise SurgeryError("PSG301", message, "\n  ".join(trails))
        for operation in group:
            if operation not in empty and operation.where.given():
                _check_positions(operation, capture)


def _check_positions(operation: Operation, capture: Capture) -> None:
    """Refuse clauses that keep some of an operation's sites and none of its positions. PSG332."""
    rules = [rule for rule in operation.file.rules if rule.kind.lengthens]
    if not any(rule.applies(operation.settings) for rule in rules):
        return
    for chosen in select_cuts(capture, operation)[1]:
        if chosen.rule in rules and chosen.unnarrowed and not chosen:
            text = describe_where(operation.where)
            message = f"{chosen.name}: no positions are where {text}, and the rule moves them"
            hint = "leave the positions as they are: shift=false"
            raise SurgeryError("PSG332", message, hint)


def _all(wheres: Sequence[Where], nots: Sequence[Where]) -> Where:
    """Clauses: all of some, and none of others."""
    parts = [where for where in wheres if where.given()]
    parts += [Where.model_validate({"not": where}) for where in nots]
    return parts[0] if len(parts) == 1 else Where(all=tuple(parts)) if parts else EVERYWHERE
