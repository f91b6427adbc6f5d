"""``peftsurgery extract``: an adapter from two checkpoints."""

from __future__ import annotations

from pathlib import Path

import click

from peftsurgery.cli.kit import force_option, json_option, output_option, print_result
from peftsurgery.cli.progress import doing


@click.command()
@click.argument("base", metavar="BASE")
@click.argument("tuned", metavar="TUNED")
@output_option()
@click.option("--rank", type=int, metavar="R", help="The largest rank that a layer gets.")
@click.option(
    "--energy",
    type=float,
    metavar="E",
    help="The share of each difference's squared norm to keep, such as 0.99.",
)
@force_option
@json_option
def extract(
    base: str,
    tuned: str,
    out: Path,
    rank: int | None,
    energy: float | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write the LoRA adapter that turns the checkpoint BASE into TUNED to OUT, for peft.

    Without --rank and --energy each layer gets the rank that stands above TUNED's rounding.
    """
    if rank is not None and energy is not None:
        raise click.UsageError("--rank and --energy each decide the rank; give one of them")
    with doing(f"comparing {base} and {tuned}"):
        from peftsurgery.formats.extraction import extract as make

        report = make(base, tuned, out, rank, energy, force)
    print_result({"schema": "peftsurgery.extract/1", **report.to_dict()}, report, as_json)
