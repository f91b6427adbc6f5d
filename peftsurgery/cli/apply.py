"""``peftsurgery apply``: operate on a model and save the surgery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peftsurgery.cli.diff import shown
from peftsurgery.cli.kit import (
    force_option,
    json_option,
    name_option,
    other_base_option,
    output_option,
    print_result,
)
from peftsurgery.cli.progress import doing
from peftsurgery.outputs import fresh

if TYPE_CHECKING:
    from peftsurgery.capture import GraphModel
    from peftsurgery.diff.comparison import Diff
    from peftsurgery.language.rule_file import RuleFile
    from peftsurgery.surgery.model.operated import OperatedModel

set_option = click.option(
    "--set", "overrides", metavar="K=V", multiple=True, help="Override a setting of the rules."
)

SEEDS = click.IntRange(-(2**63), 2**64 - 1)  # what torch.manual_seed takes


@click.command()
@click.argument("model")
@click.argument("rules", metavar="RULE...", nargs=-1, required=True)
@output_option(required=False)
@set_option
@click.option("--layers", metavar="N..M", help="Only in these layers: 3, 4.. or 0..2,5.")
@click.option("--roles", metavar="ROLE,...", help="Only sites of these roles: attn.q, ffn.*.")
@click.option("--path", metavar="RE", help="Only modules whose whole path this matches.")
@name_option("The adapter's name; the rule's unless given.")
@click.option("--seed", type=SEEDS, help="Torch's seed for the initial values; recorded.")
@other_base_option
@click.option("--dry-run", is_flag=True, help="Print the report and write nothing.")
@click.option(
    "--diff", "with_diff", is_flag=True,
    help="Print too, before anything is written, what is different from MODEL then.",
)  # fmt: skip
@force_option
@json_option
def apply(
    model: str,
    rules: tuple[str, ...],
    out: Path | None,
    overrides: tuple[str, ...],
    layers: str | None,
    roles: str | None,
    path: str | None,
    name: str | None,
    seed: int | None,
    allow_other_base: bool,
    dry_run: bool,
    with_diff: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Apply each RULE to MODEL in turn and save the surgery to OUT.

    --layers, --roles and --path narrow every rule to some of the sites that it is about.
    What is saved is the rules, a manifest and the parameters that the rules added; the model itself
    is not copied.
    """
    if (out is None) != dry_run:
        raise click.UsageError("give either --output OUT or --dry-run")
    if name is not None and len(rules) > 1:
        raise click.UsageError("--name is for one RULE; several would have the same name")
    from peftsurgery.language.loading import load_rules
    from peftsurgery.language.settings import check_settings, parse_overrides
    from peftsurgery.surgery.plan.cut import adapter_name
    from peftsurgery.surgery.plan.narrowing import where_given

    # before the model: what is misspelt is known at once
    files = [load_rules(rule) for rule in rules]
    settings = parse_overrides(overrides)
    check_settings(files, settings)
    if name is not None:
        adapter_name(name)
    where = where_given({"layers": _listed(layers), "role": _listed(roles), "path": path})
    options = {"name": name, "settings": settings, "where": where}
    read: list[str | Path] = [model, *(path for file in files for path in file.sources)]
    with nullcontext() if out is None else fresh(out, read, force) as part:
        before, operated = _operate(model, allow_other_base, seed, files, options)
        found = _difference(before, operated, model) if with_diff else None
        if found is not None and not as_json:
            click.echo(f"{shown(found, 'text')}\n")
        if part is not None:
            with doing(f"saving {out}"):
                operated.save(part)
    _print(operated, found, out, as_json)


def _print(operated: OperatedModel, found: Diff | None, out: Path | None, as_json: bool) -> None:
    """Print the report; the difference only as JSON, since as text it came before."""
    report, written = operated.report, None if out is None else str(out)
    difference = {} if found is None else {"diff": found.to_dict()}
    place = "nothing was written" if out is None else f"saved to {out}"
    document = {**report.to_dict(), **difference, "out": written}
    print_result(document, f"{report}\n{place}", as_json)


def _difference(before: GraphModel, operated: OperatedModel, spec: str) -> Diff:
    """What the operated model has other than the one that was opened."""
    from peftsurgery.diff.comparison import diff

    with doing(f"comparing {spec} before and after"):
        return diff(before, operated).named(spec, f"{spec} with {', '.join(operated.active)}")


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [item.strip() for item in text.split(",")]


def _operate(
    spec: str,
    allow_other_base: bool,
    seed: int | None,
    files: Sequence[RuleFile],
    options: Mapping[str, Any],
) -> tuple[GraphModel, OperatedModel]:
    """The model as it was opened, and operated on."""
    import torch

    from peftsurgery.cli.model import open_model
    from peftsurgery.surgery.applying import apply

    model = open_model(spec, allow_other_base)
    if seed is not None:
        torch.manual_seed(seed)
    with doing(f"applying {', '.join(file.name for file in files)}"):
        return model, apply(model, files, **options)
