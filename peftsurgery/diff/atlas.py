"""atlas: the anatomy of one model as a page: graph, roles, sites, and what rules would match."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from html import escape

from peftsurgery.capture import GraphModel
from peftsurgery.diff.blocks import innermost
from peftsurgery.diff.describing import describe_model, insertions
from peftsurgery.diff.description import Description, Insertion, SiteFacts
from peftsurgery.diff.figures import Figures, measure
from peftsurgery.diff.names import expanded, folded
from peftsurgery.diff.overlay import overlay
from peftsurgery.diff.shell import address, document
from peftsurgery.diff.summary import amount
from peftsurgery.surgery.plan.cut import Cut, Operation
from peftsurgery.surgery.plan.select import select_cuts

MATCHED = "◆"


def atlas(model: GraphModel, name: str, operations: Sequence[Operation] = ()) -> str:
    """The page of a model that is called ``name``; ``operations`` are marked where they would cut.

    They are asked in order, each seeing the cuts of those before it. Nothing is applied, and that
    one matches nothing is said and no error.
    """
    cuts: list[Cut] = []
    for operation in operations:
        cuts += select_cuts(model.base_capture, operation, cuts)[0]
    matches = insertions(cuts)
    description = describe_model(model)
    figures = measure(model, description)
    both = replace(description, insertions={**description.insertions, **matches})
    data = {**overlay(both), "compared": False, "names": [name, name], "changes": []}
    for entry in data["insertions"]:
        entry["would"] = entry["name"] in matches
    said = "\n".join([
        f"<p>{escape(description.kind)}</p>",
        _figures(figures),
        *(_operation(each, matches.values()) for each in operations),
        _roles(description, {each.module for each in matches.values()}),
    ])  # fmt: skip
    return document(name, said, data)


def _figures(figures: Figures) -> str:
    share = 100 * figures.trainable / max(figures.parameters, 1)
    rows = [
        ("nodes", amount(figures.nodes)),
        ("parameters", amount(figures.parameters)),
        ("trainable", f"{amount(figures.trainable)} ({share:.2f} %)"),
        ("size", amount(figures.bytes, "B")),
        ("FLOPs", amount(figures.flops)),
        ("activations", amount(figures.activation_bytes, "B")),
    ]
    body = "".join(f"<tr><th scope=row>{n}</th><td>{escape(value)}</td></tr>" for n, value in rows)
    at = f"FLOPs and activations of one forward at {figures.at}"
    return f"<table class=figures><tbody>{body}</tbody></table><p class=note>{escape(at)}</p>"


def _operation(operation: Operation, matches: Collection[Insertion]) -> str:
    """The sites that a rule file would cut, those of equal layers as one line."""
    mine = [each for each in matches if each.adapter == operation.name]
    found = folded(each.module for each in mine)
    lines = "".join(
        f"<li><a {address(expanded(where)[0])}><code>{escape(where or '(model)')}</code></a>"
        f"{f' <span class=note>×{count}</span>' if count > 1 else ''}</li>"
        for where, count in found
    )
    return (
        f"<details open><summary><h2>{MATCHED} {escape(operation.name)}</h2> would match "
        f"{len(mine)} sites</summary><ul class=changes>{lines}</ul></details>"
    )


def _roles(description: Description, matched: Collection[str]) -> str:
    """Blocks × roles: what is where, equal blocks as one row."""
    cells: dict[str, dict[str, str]] = {}
    for name, site in description.sites.items():
        path = name.partition(" ")[0]
        if site.role and site.kind != "parameter":
            row = cells.setdefault(innermost(path, description.blocks), {})
            row[site.role] = row.get(site.role, "") + _cell(path, site, path in matched)
    sections = "".join(_row(where, row) for where, row in _equal_rows(cells, description))
    return f"<details open><summary><h2>Roles</h2></summary>{sections}</details>"


def _row(where: str, row: Mapping[str, str]) -> str:
    first = expanded(where)[0]
    inner = "".join(
        f"<tr><th scope=row>{escape(role)}</th><td>{text.replace('{}', first)}</td></tr>"
        for role, text in row.items()
    )
    name = f"<code>{escape(where or '(model)')}</code>"
    heading = f"<a {address(first)}>{name}</a>" if where else name
    return f"<h3>{heading}</h3><table><tbody>{inner}</tbody></table>"


def _equal_rows(
    cells: Mapping[str, Mapping[str, str]], description: Description
) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Rows by the folded name of the blocks that have them."""
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for block in description.blocks:
        if block in cells:
            inside = {r: text.replace(f"/{block}.", "/{}.") for r, text in cells[block].items()}
            groups.setdefault(tuple(inside.items()), []).append(block)
    for items, blocks in groups.items():
        yield from ((where, dict(items)) for where, _ in folded(blocks))


def _cell(path: str, site: SiteFacts, matched: bool) -> str:
    facts = dict(site.facts)
    size = f"{facts['in']} → {facts['out']}" if {"in", "out"} <= facts.keys() else site.kind
    mark = f" <b class=match>{MATCHED}</b>" if matched else ""
    return f"<a {address(path)}>{escape(size)}</a>{mark} "
