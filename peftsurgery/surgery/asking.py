"""sites and why: the sites of a model, and a rule file's verdict on one of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftsurgery.anatomy import survey
from peftsurgery.arguments import checked
from peftsurgery.capture import Capture, GraphModel
from peftsurgery.language.loading import load_rules
from peftsurgery.language.rule_file import RuleFile
from peftsurgery.language.selection import Selection, every_site, verdict
from peftsurgery.language.settings import check_settings, resolve_settings, settings_of
from peftsurgery.surgery.model.shared import operations_of
from peftsurgery.surgery.plan.cut import Cut, Operation
from peftsurgery.surgery.plan.select import select_cuts


@dataclass(frozen=True)
class Why:
    """Verdict of every clause of some rules on one module or parameter."""

    path: str
    verdicts: tuple[tuple[Selection, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """The verdicts as ``--json`` prints them: of each rule, if the site is kept and why."""
        return {
            "path": self.path,
            "rules": [
                {
                    "rule": chosen.name,
                    "path": self.path,
                    "kept": any(self.path in (site.module, site.parameter) for site in chosen),
                    "why": said,
                    "counts": dict(chosen.counts()),
                }
                for chosen, said in self.verdicts
            ],
        }

    def __str__(self) -> str:
        lines = []
        for chosen, said in self.verdicts:
            lines += [chosen.name, said]
            lines += [f"{count:5d}  {text}" for text, count in chosen.counts()]
        return "\n".join(lines)


@checked
def sites(model: GraphModel) -> Selection:
    """Select all sites of a captured model; of an operated one, those of its base.

    The selection is narrowed by ``where(role=..., layers=..., path=..., kind=...)``, counted,
    iterated and printed.
    """
    return every_site(survey(model.base_capture))


@checked
def why(
    model: GraphModel,
    rules: RuleFile | str | Path,
    path: str,
    settings: Mapping[str, Any] | None = None,
) -> Why:
    """Explain which clauses of a rule file keep or drop the module or parameter at ``path``.

    ``rules`` is a rule file, a shipped name or a path; of an operated model also an adapter's name
    or that of its rule file, which is meant as it was applied. Raises PSG303 if there is no site at
    the path, and what selecting raises.
    """
    before = list(operations_of(model))
    meant = [op for op in before if rules in (op.name, op.file.name)]
    if not meant:
        file = rules if isinstance(rules, RuleFile) else load_rules(rules)
        meant = [Operation(file, resolve_settings(file), file.name)]
        before += meant
    check_settings([operation.file for operation in meant], settings or {})
    return explained(model.base_capture, before, meant, path, settings or {})


def explained(
    capture: Capture,
    operations: Sequence[Operation],
    meant: Collection[Operation],
    path: str,
    settings: Mapping[str, Any],
) -> Why:
    """Explain what the rules of the operations that are ``meant`` say of a site.

    The others are those before and after them, to whose cuts a rule may refer.
    """
    cuts: list[Cut] = []
    found: list[Selection] = []
    for operation in operations:
        given = {**operation.own_settings, **settings_of(operation.file, settings)}
        resolved = resolve_settings(operation.file, given) if operation in meant else {}
        chosen = replace(operation, settings=resolved) if operation in meant else operation
        made, selected = select_cuts(capture, chosen, cuts)
        cuts += made
        found += selected if operation in meant else []
    return Why(path, tuple((chosen, verdict(chosen, path)) for chosen in found))
