"""heat_map: how much every tensor changed, as a table of layers × roles in HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from peftsurgery.diff.weights import TensorChange

_LAYER = re.compile(r"^(.*?\.\d+)\.(.+)$")


def heat_map(changes: Sequence[TensorChange]) -> str:
    """Relative change of each tensor that a layer has; a darker cell is a larger change."""
    cells: dict[str, dict[str, float]] = {}
    for each in changes:
        found = _LAYER.match(each.after or "")
        if found and each.change is not None:
            cells.setdefault(found[1], {})[found[2]] = each.change.relative
    columns = list(dict.fromkeys(name for row in cells.values() for name in row))
    largest = max((value for row in cells.values() for value in row.values()), default=0.0)
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
        "<section><h2>Change of the weights</h2><p class=note>norm of the change over the norm of "
        f"the weight</p><table class=heat><thead><tr><td></td>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></section>"
    )


def _cell(value: float | None, largest: float) -> str:
    if value is None:
        return "<td></td>"
    share = min(value / largest, 1.0)
    return f'<td style="background:rgba(217,119,6,{0.6 * share:.2f})">{100 * value:.2g} %</td>'
