"""``peftsurgery merge``: one adapter made of others, on files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from peftsurgery.cli.kit import force_option, json_option, output_option, print_result
from peftsurgery.cli.progress import doing


@click.command()
@click.argument("adapters", metavar="DIR[=WEIGHT]...", nargs=-1, required=True)
@output_option()
@click.option(
    "--how",
    default="linear",
    show_default=True,
    help="linear, cat, svd, ties, dare_linear, dare_ties or magnitude_prune.",
)
@click.option(
    "--base", metavar="DIR", help="The base that all are for; it is asked for the modules."
)
@click.option("--rank", type=int, metavar="R", help="With svd: the rank that is kept.")
@click.option("--density", type=float, metavar="D", help="The share of entries that pruning keeps.")
@click.option(
    "--majority",
    type=click.Choice(["total", "frequency"]),
    default="total",
    show_default=True,
    help="How ties elects signs.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="What dare draws by.")
@force_option
@json_option
def merge(
    adapters: tuple[str, ...],
    out: Path,
    as_json: bool,
    **settings: Any,
) -> None:
    """Merge adapters, each a directory of peft's with its weight (1 unless given), into OUT."""
    weights: dict[str | Path, float] = {}
    for given in adapters:
        folder, weight = _parsed(given)
        if folder in weights:
            raise click.UsageError(f"'{folder}' is named twice")
        weights[folder] = weight
    with doing(f"merging {len(weights)} adapters"):
        from peftsurgery.checkpoint.merging import merge_adapters

        report = merge_adapters(weights, out, **settings)
    print_result({"schema": "peftsurgery.merge/1", **report.to_dict()}, report, as_json)


def _parsed(given: str) -> tuple[str, float]:
    """A directory and its weight; a name that has a = in it and exists is a directory."""
    folder, sign, weight = given.rpartition("=")
    if not sign or Path(given).exists():
        return given, 1.0
    try:
        return folder, float(weight)
    except ValueError:
        raise click.UsageError(f"'{weight}' is no weight: write {folder}=0.5") from None
