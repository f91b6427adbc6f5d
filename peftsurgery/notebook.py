"""What notebooks show of an object: a heading and tables, as one piece of HTML.

No script, no network, no colour of its own: text and lines take the notebook's, light or dark. All
text is escaped. Of a long table the first rows are shown, and the others on demand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

SHOWN = 12
"""How many rows of a table are shown at once."""

_STYLE = """<style>
.peftsurgery{font-size:90%;max-width:100%;overflow-x:auto}
.peftsurgery table{border-collapse:collapse;margin:.3em 0;color:inherit;background:none}
.peftsurgery :is(td,th){text-align:left;vertical-align:top;padding:.15em .8em .15em 0;color:inherit}
.peftsurgery tr{background:none;border-bottom:1px solid rgba(128,128,128,.3)}
.peftsurgery summary{cursor:pointer}
</style>"""


def shown(heading: str, *parts: str) -> str:
    """A heading (plain text) above parts (HTML), as an object's ``_repr_html_`` returns it."""
    body = "\n".join(part for part in parts if part)
    return f'<div class="peftsurgery">{_STYLE}\n<b>{escape(heading)}</b>\n{body}\n</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows of plain values under their names; rows after the first twelve fold away. HTML."""
    lines = list(rows)
    if not lines:
        return ""
    first, rest = lines[:SHOWN], lines[SHOWN:]
    made = _table(head, first)
    if rest:
        made += f"\n<details><summary>{len(rest)} more</summary>\n{_table(head, rest)}\n</details>"
    return made


def notes(texts: Iterable[str]) -> str:
    """Sentences, one a line. HTML."""
    return "\n".join(f"<div>{escape(text)}</div>" for text in texts)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [_row("th", head), *(_row("td", row) for row in rows)]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _row(tag: str, cells: Sequence[Any]) -> str:
    inner = "".join(f"<{tag}>{_cell(cell)}</{tag}>" for cell in cells)
    return f"<tr>{inner}</tr>"


def _cell(value: Any) -> str:
    return "" if value is None else escape(f"{value:,}" if type(value) is int else str(value))
