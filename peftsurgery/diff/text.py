"""text: a difference for a terminal, folded to its width; signs say what colours say."""

from __future__ import annotations

import io

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from peftsurgery.diff.lines import Line
from peftsurgery.diff.summary import Summary

AROUND = 14
"""Lines of a screen that are no changes: the names, the headline, notes, the next prompt."""
_STYLES = {"+": "green", "-": "red", "~": "yellow", ">": "cyan"}


def rendered(
    summary: Summary, width: int | None = None, colour: bool = False, height: int | None = None
) -> str:
    """The text, of lines of at most ``width`` characters (the terminal's if None).

    Of more changes than ``height`` lines have room for, each part shows its first ones and says how
    many are left out.
    """
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=colour,
        no_color=not colour,
        highlight=False,
    )
    console.print(
        Text(f"{printable(summary.names[0])} → {printable(summary.names[1])}", style="bold")
    )
    console.print(summary.sentence())
    if summary.lines:
        console.print(Padding(_headline(summary), (0, 0, 0, 2)))
    parts = list(summary.parts())
    limit = _limit([len(found) for _, found in parts], height)
    for title, found in parts:
        console.print(Text(title, style="bold"))
        console.print(Padding(_changes(found[:limit]), (0, 0, 0, 2)))
        if len(found) > limit:
            console.print(Text(f"  and {len(found) - limit} more (--all)", style="dim"))
    for note in summary.notes():
        console.print(Text(note, style="dim"))
    text = console.file.getvalue() if isinstance(console.file, io.StringIO) else ""
    return "\n".join(line.rstrip() for line in text.splitlines())


def _limit(sizes: list[int], height: int | None) -> int:
    """How many changes of each part fit below the headline and the parts' titles; at least two."""
    most = max(sizes, default=0)
    if height is None:
        return most
    room = height - AROUND - 2 * len(sizes)
    fitting = (n for n in range(most, 2, -1) if sum(min(size, n) for size in sizes) <= room)
    return next(fitting, 2)


def printable(text: str) -> str:
    """``text`` with control characters spelt out: names from a file must not drive a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _headline(summary: Summary) -> Table:
    table = Table.grid(padding=(0, 2))
    for justify in ("left", "right", "right", "right"):
        table.add_column(justify=justify, overflow="fold")
    for row in summary.headline():
        table.add_row(*row)
    return table


def _changes(found: list[Line]) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    for line in found:
        times = f" ×{line.count}" if line.count > 1 else ""
        where = f"{printable(line.where) or '(model)'}: "
        body = Text.assemble((where, "bold"), printable(line.text), (times, "dim"))
        table.add_row(Text(line.sign, style=_STYLES.get(line.sign, "")), body)
    return table
