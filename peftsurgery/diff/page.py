"""page: a difference as one self-contained HTML file.

Nothing is loaded from elsewhere: the page forbids itself the network. It opens with the headline,
the changes by part, the tensors' changes as layers × roles, and the module tree with equal blocks
collapsed; every part has an address (``#c3``), and works by keyboard and without scripts.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from peftsurgery.diff.description import Description
from peftsurgery.diff.heat import heat_map
from peftsurgery.diff.lines import Line
from peftsurgery.diff.page_parts import POLICY, SCRIPT, STYLE
from peftsurgery.diff.summary import Summary
from peftsurgery.diff.tree import ModuleEntry, module_tree

_WORDS = {"+": "added", "-": "removed", "~": "changed", ">": "renamed"}


def page(summary: Summary, after: Description | None = None) -> str:
    """The whole file; ``after`` is the second model, whose modules are shown."""
    first, second = (escape(name) for name in summary.names)
    changes = {id(line): f"c{number}" for number, line in enumerate(summary.lines)}
    at = summary.figures[0].at if summary.figures else ""
    body = "\n".join([
        f"<h1>{first} → {second}</h1>",
        f"<p>{escape(summary.sentence())}</p>",
        _headline(summary),
        f"<p class=note>FLOPs and activations of one forward at {escape(at)}</p>" if at else "",
        '<p><label>Find <input id=find type=search placeholder="a name; press /"></label>'
        " <span id=found role=status></span></p>",
        *(_changes(title, found, changes) for title, found in summary.parts()),
        heat_map(summary.weights or ()),
        "" if after is None else _modules(after, summary, changes),
    ])  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{first} → {second}</title>\n<style>{STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main>\n<script>{SCRIPT}</script></body></html>\n"
    )


def _modules(after: Description, summary: Summary, changes: dict[int, str]) -> str:
    tree = "".join(_tree(module_tree(after, summary.lines), changes, ""))
    return f"<section><h2>Modules</h2>\n{tree}</section>"


def _headline(summary: Summary) -> str:
    rows = "".join(
        f"<tr><th scope=row>{escape(name)}</th>"
        + "".join(f"<td>{escape(value)}</td>" for value in values)
        + "</tr>"
        for name, *values in summary.headline()
    )
    head = "<tr><td></td><th scope=col>a</th><th scope=col>b</th><th scope=col>change</th></tr>"
    return f"<table class=figures><thead>{head}</thead><tbody>{rows}</tbody></table>"


def _changes(title: str, found: list[Line], changes: dict[int, str]) -> str:
    items = "\n".join(_change(line, changes[id(line)]) for line in found)
    return (
        f"<section><details open><summary><h2>{escape(title)}</h2> {len(found)}</summary>\n"
        f"<ul class=changes>\n{items}\n</ul></details></section>"
    )


def _change(line: Line, address: str) -> str:
    times = f" <span class=note>×{line.count}</span>" if line.count > 1 else ""
    return (
        f'<li id="{address}" class="{_WORDS[line.sign]}"><a href="#{address}" '
        f'title="{_WORDS[line.sign]}">{escape(line.sign)}</a> '
        f"<code>{escape(line.where or '(model)')}</code> {escape(line.text)}{times}</li>"
    )


def _tree(part: ModuleEntry, changes: dict[int, str], indent: str) -> Iterator[str]:
    """A module and those in it; open where something beneath it changed, but not into blocks."""
    marks = " ".join(
        f'<a class="{_WORDS[line.sign]}" href="#{changes[id(line)]}" '
        f'title="{escape(line.text)}">{escape(line.sign)}</a>'
        for line in part.lines
    )
    below = "" if not part.beneath else f" <span class=note>{part.beneath} changes in it</span>"
    times = f" <span class=note>×{part.count}</span>" if part.count > 1 else ""
    size = f" <span class=note>{escape(part.size)}</span>" if part.size else ""
    label = f"<code>{escape(part.name)}</code>{times}{size} {marks}{below}"
    if not part.parts:
        yield f"{indent}<div class=leaf>{label}</div>\n"
        return
    is_open = " open" if not indent or (part.beneath and part.count == 1) else ""
    yield f"{indent}<details{is_open}><summary>{label}</summary>\n"
    for inner in part.parts:
        yield from _tree(inner, changes, indent + " ")
    yield f"{indent}</details>\n"
