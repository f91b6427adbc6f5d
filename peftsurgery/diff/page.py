"""page: a difference as one self-contained HTML file.

The headline and the changes by part stand beside the graph of both models laid over each other, in
which equal blocks are one part; beneath it, how much each tensor changed as layers × roles. Every
change (``#c3``) and every part (``#/layers.0.attn``) has an address. What is told is there without
scripts too.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from peftsurgery.diff.description import Description
from peftsurgery.diff.heat import heat_map
from peftsurgery.diff.lines import Line
from peftsurgery.diff.names import expanded
from peftsurgery.diff.overlay import overlay, told
from peftsurgery.diff.script import Script
from peftsurgery.diff.shell import address, document
from peftsurgery.diff.summary import Summary

_WORDS = {"+": "added", "-": "removed", "~": "changed", ">": "renamed"}


def page(
    summary: Summary,
    models: tuple[Description, Description] | None = None,
    script: Script | None = None,
) -> str:
    """The whole file; without ``models`` and their ``script`` there is no graph."""
    numbers = {id(line): number for number, line in enumerate(summary.lines)}
    said = "\n".join([
        f"<p>{escape(summary.sentence())}</p>",
        _headline(summary),
        *(f"<p class=note>{escape(note)}</p>" for note in summary.notes()),
        *(_changes(title, found, numbers) for title, found in summary.parts()),
    ])  # fmt: skip
    data = None
    roles: Mapping[str, str] = {}
    if models is not None and script is not None:
        before, after = models
        data = {
            **overlay(after, script, before),
            "compared": True,
            "names": list(summary.names),
            "changes": told(summary, script),
        }
        roles = {name.partition(" ")[0]: each.role for name, each in after.sites.items()}
    heat = heat_map(summary.weights or (), roles)
    return document(" → ".join(summary.names), said, data, heat)


def _headline(summary: Summary) -> str:
    rows = "".join(
        f"<tr><th scope=row>{escape(name)}</th>"
        + "".join(f"<td>{escape(value)}</td>" for value in values)
        + "</tr>"
        for name, *values in summary.headline()
    )
    head = "<tr><td></td><th scope=col>a</th><th scope=col>b</th><th scope=col>change</th></tr>"
    return (
        f"<table class=figures><thead>{head}</thead><tbody>{rows}</tbody></table>" if rows else ""
    )


def _changes(title: str, found: list[Line], numbers: Mapping[int, int]) -> str:
    items = "\n".join(_change(line, numbers[id(line)]) for line in found)
    return (
        f"<details open><summary><h2>{escape(title)}</h2> {len(found)}</summary>\n"
        f"<ul class=changes>\n{items}\n</ul></details>"
    )


def _change(line: Line, number: int) -> str:
    """A line: its sign leads to itself, its place into the graph."""
    times = f" <span class=note>×{line.count}</span>" if line.count > 1 else ""
    where = f"<code>{escape(line.where or '(model)')}</code>"
    if line.part not in ("config", "rule"):
        where = f"<a {address(expanded(line.where)[0])}>{where}</a>"
    word = _WORDS[line.sign]
    return (
        f'<li id="c{number}" class="{word}"><a class=sign href="#c{number}" title="{word}" '
        f'aria-label="{word}">{escape(line.sign)}</a>{where} {escape(line.text)}{times}</li>'
    )
