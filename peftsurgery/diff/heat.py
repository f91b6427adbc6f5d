"""heat_map: how much every tensor changed, as a table of layers × roles in HTML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

from peftsurgery.diff.shell import address
from peftsurgery.diff.weights import TensorChange

_LAYER = re.compile(r"^(.*?\.\d+)\.(.+)$")
_SHADES = 5


def heat_map(changes: Sequence[TensorChange], roles: Mapping[str, str]) -> str:
    """Relative change of each tensor that a layer has; a darker cell is a larger change.

    ``roles`` are those of modules; a tensor of a module without one stands under its name.
    """
    cells: dict[str, dict[str, tuple[float, str]]] = {}
    for each in changes:
        name = each.after or ""
        found = _LAYER.match(name)
        if found and each.change is not None:
            column = _column(found[2], roles.get(name.rpartition(".")[0], ""))
            cells.setdefault(found[1], {})[column] = each.change.relative, name
    columns = list(dict.fromkeys(name for row in cells.values() for name in row))
    largest = max((value for row in cells.values() for value, _ in row.values()), default=0.0)
    if not largest:
        return ""
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in columns)
    rows = "".join(
        f"<tr><th scope=row>{escape(layer)}</th>"
        + "".join(_cell(row.get(name), largest) for name in columns)
        + "</tr>"
        for layer, row in cells.items()
    )
    return (
        '<section class=wide role="region" aria-label="Change of the weights" tabindex="0">'
        "<h2>Change of the weights</h2><p class=note>norm of the change over the norm of the "
        f"weight</p><table class=heat><thead><tr><td></td>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></section>"
    )


def _column(name: str, role: str) -> str:
    leaf = name.rpartition(".")[2]
    return name if not role else role if leaf == "weight" else f"{role} {leaf}"


def _cell(found: tuple[float, str] | None, largest: float) -> str:
    if found is None:
        return "<td></td>"
    value, name = found
    shade = round(_SHADES * min(value / largest, 1.0))
    link = f'<a {address(name.rpartition(".")[0])} title="{escape(name)}">{100 * value:.2g} %</a>'
    return f"<td class=h{shade}>{link}</td>"
