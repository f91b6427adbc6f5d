"""``peftsurgery verify``: check what a streamed fold wrote against its certificate."""

from __future__ import annotations

import click

from peftsurgery.cli.kit import json_option, print_result
from peftsurgery.cli.progress import doing


@click.command()
@click.argument("out", metavar="OUT")
@json_option
def verify(out: str, as_json: bool) -> None:
    """Check the folded directory OUT, byte by byte, against the certificate in it."""
    from peftsurgery.checkpoint.certificate import verify as check

    with doing(f"reading {out}"):
        result = check(out)
    print_result(result.to_dict(), result, as_json)
