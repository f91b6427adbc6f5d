"""markdown: a difference for a pull request."""

from __future__ import annotations

from collections.abc import Iterator

from peftsurgery.diff.summary import Summary
from peftsurgery.diff.text import printable

SHOWN = 30
"""How many lines of a part stand there at once; the others fold away."""


def markdown(summary: Summary) -> str:
    """A headline table and the changes by part, as GitHub and GitLab show them."""
    return "\n".join(_lines(summary)) + "\n"


def _lines(summary: Summary) -> Iterator[str]:
    first, second = (code(name) for name in summary.names)
    yield f"### {first} → {second}"
    yield ""
    yield f"{summary.sentence().capitalize()}."
    if summary.left_out:
        yield f"Not compared: {summary.left_out}."
    if not summary.lines:
        return
    rows = summary.headline()
    if rows:
        yield from ("", "| | a | b | |", "|---|--:|--:|--:|")
        yield from (f"| {' | '.join(row)} |" for row in rows)
    for title, found in summary.parts():
        yield from ("", f"**{title}**", "")
        made = [
            f"- `{line.sign}` {code(line.where or '(model)')} {code(line.text)}"
            + (f" ×{line.count}" if line.count > 1 else "")
            for line in found
        ]
        yield from made[:SHOWN]
        if made[SHOWN:]:
            yield from ("", f"<details><summary>{len(made) - SHOWN} more</summary>", "")
            yield from (*made[SHOWN:], "", "</details>")


def code(text: str) -> str:
    """``text`` as code, whatever backquotes are in it."""
    shown = printable(text)
    longest = max((len(run) for run in _runs(shown)), default=0)
    fence = "`" * (longest + 1)
    inner = f" {shown} " if shown.startswith("`") or shown.endswith("`") else shown
    return f"{fence}{inner}{fence}"


def _runs(text: str) -> Iterator[str]:
    """The stretches of backquotes in a text."""
    run = ""
    for character in f"{text} ":
        if character == "`":
            run += character
        elif run:
            yield run
            run = ""
