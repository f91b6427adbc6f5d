"""``peftsurgery inspect``: the blocks, sites and roles of a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peftsurgery.cli.kit import clean, force_option, json_option, print_json, print_result
from peftsurgery.outputs import fresh

if TYPE_CHECKING:
    from rich.tree import Tree

    from peftsurgery.anatomy import Placed
    from peftsurgery.capture import Capture

# What of a site's facts is printed: with its name, and by its value alone.
NAMED = ("heads", "kv_heads", "head_dim", "after", "shape")
PLAIN = ("kind", "op", "dtype")


@click.command()
@click.argument("model", metavar="MODEL|SURGERY")
@click.option(
    "--html", "page", metavar="FILE", type=click.Path(path_type=Path),
    help="Write a page with the graph instead, which works offline; FILE must not exist.",
)  # fmt: skip
@click.option(
    "--rule", "rules", metavar="RULE", multiple=True,
    help="Mark on that page what this rule file would match; for several give it again.",
)  # fmt: skip
@force_option
@json_option
def inspect(
    model: str, page: Path | None, rules: tuple[str, ...], force: bool, as_json: bool
) -> None:
    """Show the blocks, sites and roles of MODEL as a tree; blocks of equal structure once.

    Of a saved surgery, show what it holds: adapters with their rules, settings and sizes, its base
    and the fingerprint of that. The base is not opened, and need not be there, but for a page.
    """
    if page is not None:
        _write_page(model, page, rules, force)
        return
    if rules:
        raise click.UsageError("--rule marks a page: give --html FILE")
    from peftsurgery.surgery.model.saved.manifest import is_surgery

    if is_surgery(Path(model)):
        from peftsurgery.surgery.model.saved.contents import contents_of

        contents = contents_of(Path(model))
        print_result(contents.to_dict(), contents, as_json)
        return
    from peftsurgery.anatomy import survey
    from peftsurgery.cli.model import open_model

    captured = open_model(model).base_capture
    found = survey(captured)
    if as_json:
        print_json(_document(model, captured, found))
    else:
        _print_tree(model, captured, found)


def _write_page(model: str, page: Path, rules: tuple[str, ...], force: bool) -> None:
    from peftsurgery.cli.model import open_model
    from peftsurgery.diff.atlas import atlas
    from peftsurgery.language.loading import load_rules
    from peftsurgery.language.settings import resolve_settings
    from peftsurgery.surgery.plan.cut import Operation

    # before the model: what is misspelt is known at once
    files = [load_rules(rule) for rule in rules]
    operations = [Operation(file, resolve_settings(file), file.name) for file in files]
    with fresh(page, [model], force) as part:
        part.write_text(atlas(open_model(model), model, operations), encoding="utf-8")


def _document(model: str, capture: Capture, found: Sequence[Placed]) -> dict[str, Any]:
    from peftsurgery.language.selection import site_dict

    return {
        "model": model,
        "type": capture.top.kind,
        "notes": list(capture.notes),
        "blocks": [
            {"path": path, "programs": [program.label for program in programs]}
            for path, programs in capture.programs.items()
            if path
        ],
        "sites": [site_dict(site) for site in found],
    }


def _print_tree(model: str, capture: Capture, found: Sequence[Placed]) -> None:
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    from peftsurgery.surgery.model.coverage import Coverage

    sites: dict[str, list[Placed]] = {}
    for site in found:
        sites.setdefault(site.block, []).append(site)
    tree = Tree(Text(f"{capture.top.kind}  {clean(model)}", style="bold"))
    _add_sites(tree, sites.get("", []))
    paths = [path for path in capture.programs if path]
    for _, group in groupby(paths, key=lambda path: _structure(capture, path)):
        equal = list(group)
        kind = capture.programs[equal[0]][0].kind
        span = equal[0] if len(equal) == 1 else f"{equal[0]} … {equal[-1]}"
        count = "1 block" if len(equal) == 1 else f"{len(equal)} equal blocks"
        _add_sites(tree.add(Text(f"{clean(span)}  {kind}, {count}")), sites.get(equal[0], []))
    layers = Coverage.of(found, ()).layers
    for row in layers:
        counts = (f"{name} {share.of}" for name, share in row.roles.items())
        span = f"{row.first}" if row.first == row.last else f"{row.first} … {row.last}"
        tree.add(Text(clean(f"roles of {row.stack}.{span}: {', '.join(counts)}")))
    for note in capture.notes:
        tree.add(Text(f"note: {clean(note)}", style="yellow"))
    # A terminal cuts long lines; a pipe gets them whole.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 1000)
    console.print(tree, no_wrap=True, overflow="ellipsis", crop=False)


def _structure(capture: Capture, path: str) -> tuple[str, tuple[str, ...]]:
    """What equal blocks of one list have in common."""
    return path.rpartition(".")[0], tuple(program.label for program in capture.programs[path])


def _add_sites(tree: Tree, sites: list[Placed]) -> None:
    from rich.text import Text

    owners = {site.module for site in sites if site.kind != "parameter"}
    for site in sites:
        if site.kind == "parameter" and site.module in owners:
            continue  # the weights of a site that is shown
        name = clean(site.site.module or site.site.parameter or "(itself)")
        label = f"[{site.site.label}]" if site.site.label else ""
        line = Text.assemble(
            (f"{site.kind:10}", "dim"), f" {name}{label}  ", (site.role or "-", "cyan")
        )
        tree.add(line.append(f"  {_facts(site)}", "dim"))


def _facts(site: Placed) -> str:
    """Sizes and properties in a few words: 384 → 1536, float32."""
    facts = site.facts
    words = [f"{facts['in']} → {facts['out']}"] if {"in", "out"} <= facts.keys() else []
    words += [f"{name.replace('_', ' ')} {facts[name]}" for name in NAMED if name in facts]
    words += ["causal"] if facts.get("causal") is True else []
    words += [str(facts[name]).removeprefix("torch.") for name in PLAIN if name in facts]
    return ", ".join(word for word in words if word != site.kind)
