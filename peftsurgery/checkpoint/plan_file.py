"""Plans of folds as JSON: made in one process, carried out in another.

    {"sites": [{"weights": {"W": "...q_proj.weight"}, "fold": {"W": "W + scale * (B @ A)"}, ...}],
     "replaced": {}, "record": {...}, "files": {"README.md": "<base64>"}, "without": []}

Expressions are their texts, sizes that are several numbers are lists.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from peftsurgery.checkpoint.plan import FoldPlan, Piece, SiteFold
from peftsurgery.language.expression import Expression, parse


def plan_as_json(plan: FoldPlan) -> bytes:
    """Write a plan as JSON."""
    files = {name: base64.b64encode(content).decode() for name, content in plan.files.items()}
    said = {
        "sites": [site_as_data(site) for site in plan.sites],
        "replaced": dict(plan.replaced),
        "record": dict(plan.record),
        "files": files,
        "without": sorted(plan.without),
        "stacks": dict(plan.stacks),
        "ties": dict(plan.ties),
        "untied": dict(plan.untied),
        "config": dict(plan.config),
        "resized": dict(plan.resized),
    }
    return json.dumps(said, default=str).encode()


def plan_from_json(content: bytes) -> FoldPlan:
    """Read what :func:`plan_as_json` wrote."""
    said = json.loads(content)
    return FoldPlan(
        sites=tuple(site_from_data(entry) for entry in said["sites"]),
        replaced=said["replaced"],
        record=said["record"],
        files={name: base64.b64decode(text) for name, text in said["files"].items()},
        without=frozenset(said["without"]),
        stacks=stacks_from_data(said["stacks"]),
        ties=said["ties"],
        untied=said["untied"],
        config=said["config"],
        resized={name: (rows, key) for name, (rows, key) in said["resized"].items()},
    )


def site_as_data(site: SiteFold) -> dict[str, Any]:
    """A site as JSON holds it."""
    return {
        "adapter": site.adapter,
        "module": site.module,
        "weights": dict(site.weights),
        "parameters": dict(site.parameters),
        "numbers": dict(site.numbers),
        "fold": _texts(site.fold),
        "let": _texts(site.let),
        "absent": list(site.absent),
        "turned": sorted(site.turned),
        "axes": {name: list(found) for name, found in site.axes.items()},
        "slice": site.slice,
        "rows": None if site.rows is None else dict(site.rows),
        "lines": None if site.lines is None else dict(site.lines),
    }


def site_from_data(entry: Mapping[str, Any]) -> SiteFold:
    """Read what :func:`site_as_data` wrote."""
    part = entry["slice"]
    return SiteFold(
        **{name: entry[name] for name in ("adapter", "module", "weights", "parameters", "rows")},
        numbers={name: _number(value) for name, value in entry["numbers"].items()},
        fold=_expressions(entry["fold"]),
        let=_expressions(entry["let"]),
        absent=tuple(entry["absent"]),
        turned=frozenset(entry["turned"]),
        axes={name: (tuple(a), tuple(b)) for name, (a, b) in entry.get("axes", {}).items()},
        slice=None if part is None else tuple(part),
        lines=entry.get("lines"),  # surgeries that were saved before have none
    )


def stacks_from_data(said: Mapping[str, Any]) -> dict[str, tuple[Piece, ...]]:
    """The pieces of stacks, as JSON has them."""
    return {
        name: tuple((str(piece), int(e), int(i), int(j)) for piece, e, i, j in pieces)
        for name, pieces in said.items()
    }


def _number(value: Any) -> Any:
    """A size or a setting; sizes that are several numbers are tuples."""
    return tuple(value) if isinstance(value, list) else value


def _texts(expressions: Mapping[str, Expression]) -> dict[str, str]:
    return {name: expression.text for name, expression in expressions.items()}


def _expressions(texts: Mapping[str, str]) -> dict[str, Expression]:
    return {name: parse(text) for name, text in texts.items()}
