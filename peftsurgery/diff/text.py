"""text: a difference for a terminal, folded to its width; signs say what colours say."""

from __future__ import annotations

import io

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from peftsurgery.diff.lines import Line
from peftsurgery.diff.summary import Summary

_STYLES = {"+": "green", "-": "red", "~": "yellow", ">": "cyan"}


def rendered(summary: Summary, width: int | None = None, colour: bool = False) -> str:
    """The text, of lines of at most ``width`` characters (the terminal's if None)."""
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
    for title, found in summary.parts():
        console.print(Text(title, style="bold"))
        console.print(Padding(_changes(found), (0, 0, 0, 2)))
    for note in summary.notes():
        console.print(Text(note, style="dim"))
    text = console.file.getvalue() if isinstance(console.file, io.StringIO) else ""
    return "\n".join(line.rstrip() for line in text.splitlines())


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
