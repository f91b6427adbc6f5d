"""``peftsurgery import``: an adapter of another program as one of peft's."""

from __future__ import annotations

from pathlib import Path

import click

from peftsurgery.cli.kit import force_option, json_option, output_option, print_result
from peftsurgery.cli.progress import doing


@click.command("import")
@click.argument("adapter", metavar="ADAPTER")
@click.option("--base", required=True, metavar="MODEL", help="The model that it is for.")
@output_option()
@click.option(
    "--part",
    metavar="PART",
    help="The model of a pipeline that is meant, where ADAPTER is for several: unet, transformer, "
    "text_encoder.",
)
@force_option
@json_option
def import_(
    adapter: str, base: str, out: Path, part: str | None, force: bool, as_json: bool
) -> None:
    """Write the ADAPTER of kohya's trainer, LyCORIS, diffusers or mlx-lm to OUT, as peft has it.

    ADAPTER is a safetensors file, or a directory with one.
    """
    with doing(f"reading {adapter}"):
        from peftsurgery.formats.import_adapter import import_adapter

        report = import_adapter(adapter, out, base, part, force)
    print_result({"schema": "peftsurgery.import/1", **report.to_dict()}, report, as_json)
