"""``peftsurgery unfold``: the base that an adapter was folded into, bit for bit."""

from __future__ import annotations

from pathlib import Path

import click

from peftsurgery.cli.kit import json_option, output_option, print_result
from peftsurgery.cli.progress import doing


@click.command()
@click.argument("folded", metavar="FOLDED")
@output_option()
@click.option("--base", metavar="DIR", help="Take the weights from this base, not from residuals.")
@json_option
def unfold(folded: str, out: Path, base: str | None, as_json: bool) -> None:
    """Restore the base that a streamed fold to FOLDED was made from, bit for bit."""
    from peftsurgery.checkpoint.unfolding import unfold_checkpoint

    with doing(f"unfolding {folded}"):
        result = unfold_checkpoint(folded, out, base)
    print_result(result.to_dict(), result, as_json)
